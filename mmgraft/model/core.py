"""What the parts of :class:`GraftedModel` share: base, tower, workflows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.utils import GenerationMixin
from typing_extensions import Self

from mmgraft.anatomy import Anatomy, examine
from mmgraft.errors import UsageError
from mmgraft.model.config import GraftedConfig
from mmgraft.model.workflow import Workflow
from mmgraft.vision.towers.base import VisionTower


class GraftedCore(PreTrainedModel, GenerationMixin):
    """A base, a tower and named workflows; how they run is in the subclasses.

    Args:
        base: A loaded causal LM; it is never edited.
        vision_tower: The frozen image encoder, or None for a model that only gets features.
        workflows: The grafts by name; more come with :meth:`GraftedModel.add_workflow`.
        anatomy: The base's, where it was examined before.
    """

    config_class = GraftedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(
        self,
        base: PreTrainedModel,
        vision_tower: VisionTower | None,
        workflows: Sequence[Workflow] = (),
        anatomy: Anatomy | None = None,
    ) -> None:
        config = GraftedConfig(base.config)
        super().__init__(config)
        self.base = base
        self.vision_tower = vision_tower
        self.anatomy: Anatomy = examine(base) if anatomy is None else anatomy
        self.workflows = nn.ModuleDict()
        self.default_workflow = workflows[0].name if workflows else "mm"
        signature = inspect.signature(base.base_model.forward)
        self._takes_positions = "position_ids" in signature.parameters
        self._packs: dict[tuple[str, int], str | None] = {}  # why rows cannot be packed
        self.gradient_checkpointing = False
        self.lockstep = False  # see mmgraft.model.sharded.lockstep
        self._only_text = False
        if base.can_generate():
            self.generation_config = base.generation_config
        for workflow in workflows:
            self._attach(workflow)
        self.eval()

    # -- workflows ------------------------------------------------------------------------------

    def _attach(self, workflow: Workflow) -> None:
        self.workflows[workflow.name] = workflow
        slot = self.anatomy.num_layers + 1
        for other in self._workflow_list():
            other.graft.assign_slots(slot)
            slot += len(other.graft.slot_layers())

    def _workflow_list(self) -> list[Workflow]:
        return list(self.workflows.values())  # type: ignore[arg-type]

    @property
    def names(self) -> list[str]:
        """Names of the workflows beside ``text``, in order."""
        return list(self.workflows)

    def workflow(self, name: str | None = None) -> Workflow:
        """A workflow by name (default: the first)."""
        name = name or self.default_workflow
        if name not in self.workflows:
            raise UsageError(
                f"no workflow is called {name!r}; this model has: {', '.join(self.names)}."
            )
        return self.workflows[name]  # type: ignore[return-value]

    @contextmanager
    def text_only(self) -> Iterator[Self]:
        """While the block lasts every row runs ``text``: the base, bit for bit."""
        before, self._only_text = self._only_text, True
        try:
            yield self
        finally:
            self._only_text = before

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The base's."""
        return cast(nn.Module, self.base.get_output_embeddings())

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """The tower's features: ``(images, 3, H, W) -> (images, P, tower width)``, no gradient."""
        if self.vision_tower is None:
            raise UsageError("this model was loaded without its vision tower: give image_features.")
        tower = self.vision_tower
        with torch.no_grad():
            return tower(pixel_values.to(device=tower.device, dtype=tower.dtype))
