"""LLaVA's processor, with the workflow of a request in each of its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.models.llava import LlavaMultiModalProcessor
from vllm.multimodal.inputs import MultiModalFieldConfig, PlaceholderRange

from mmgraft_vllm import KEY


class GraftProcessor(LlavaMultiModalProcessor):
    """LLaVA's; two things are new.

    An image carries the number of its workflow, and its hash the name, so that what is cached for
    one workflow is never another's. And the first image's placeholder reaches back to the first
    token: blocks before the image then have the image in their hash, since their keys and values
    are the workflow's, not the base's.
    """

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        kwargs = dict(hf_kwargs)
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
            raise ValueError(f"{name!r} sees no images; those that do: {', '.join(names)}")
        return names.index(name) + 1

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, KEY: MultiModalFieldConfig.batched("image")}

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        made = super().apply(*args, **kwargs)
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
