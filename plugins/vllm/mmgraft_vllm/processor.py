"""LLaVA's processor, with the workflow of a request in each of its images, or alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.inputs import mm_input
from vllm.model_executor.models.llava import LlavaMultiModalProcessor, LlavaProcessingInfo
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.multimodal.parse import ProcessorBatchItems

from mmgraft_vllm import ALWAYS, KEY


class GraftInfo(LlavaProcessingInfo):
    """LLaVA's, which also takes a workflow's name in place of images."""

    def parse_mm_data(self, mm_data: Any, *, validate: bool = True) -> Any:
        images = {kind: given for kind, given in mm_data.items() if kind != KEY}
        items = super().parse_mm_data(images, validate=validate)
        if KEY in mm_data:
            items[KEY] = ProcessorBatchItems([mm_data[KEY]], KEY)
        return items


class GraftProcessor(LlavaMultiModalProcessor):
    """LLaVA's; three things are new.

    An image carries the number of its workflow, and its hash the name, so that what is cached for
    one workflow is never another's. The first image's placeholder reaches back to the first
    token: blocks before the image then have the image in their hash, since their keys and values
    are the workflow's, not the base's. And a conversation that asks for a workflow without an image
    has an item that carries the workflow and stands for no position: at the first token, so that
    its hash is part of the first block's, and by that of all later ones.
    """

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        kwargs = {name: value for name, value in hf_kwargs.items() if name != ALWAYS}
        number = self._number(kwargs.pop(KEY, None))
        made = super()._apply_hf_processor_main(mm_items, kwargs)
        if "pixel_values" in made:
            made[KEY] = torch.full((len(made["pixel_values"]),), number)
        return made

    def _number(self, name: object) -> int:
        names = [one["name"] for one in self.info.get_hf_config().mmgraft["workflows"]]
        if name is None:
            return 1
        if name not in names:
            raise ValueError(
                f"{name!r} is no workflow, and sees no images; workflows: {', '.join(names)}"
            )
        return names.index(name) + 1

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, KEY: _field("image")}

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        if KEY in inputs.mm_data_items:
            return self._without_image(inputs)
        made = super().apply(inputs, timing_ctx)
        ranges = list(made["mm_placeholders"].get("image", ()))
        if ranges and ranges[0].offset:
            first = ranges[0]
            inside = first.is_embed
            if inside is None:
                inside = torch.ones(first.length, dtype=torch.bool)
            mask = torch.cat([torch.zeros(first.offset, dtype=torch.bool), inside])
            ranges[0] = PlaceholderRange(0, first.offset + first.length, is_embed=mask)
            made["mm_placeholders"] = {**made["mm_placeholders"], "image": ranges}
        return made

    def _without_image(self, inputs: Any) -> Any:
        name = inputs.mm_data_items[KEY][0]
        config = self.info.ctx.get_mm_config()
        code = MultiModalHasher.hash_kwargs(
            config.mm_hasher_algorithm, model_id=self.info.model_id, workflow=str(name)
        )
        number = {KEY: torch.tensor([self._number(name)])}
        return mm_input(
            prompt_token_ids=inputs.prompt,
            mm_kwargs=MultiModalKwargsItems.from_hf_inputs(number, {KEY: _field(KEY)}),
            mm_hashes={KEY: [code]},
            mm_placeholders={KEY: [PlaceholderRange(0, 1, is_embed=torch.zeros(1).bool())]},
        )


def _field(kind: str) -> MultiModalFieldConfig:
    # What is kept on the CPU is there for M-RoPE even where the prefix cache covers the item.
    return MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
