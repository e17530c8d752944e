"""What the parts of :class:`GraftedModel` share: base, tower, workflows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation.utils import GenerationMixin
from typing_extensions import Self

from mmgraft.anatomy import Anatomy, examine
from mmgraft.errors import UsageError
from mmgraft.model.images import GivenImages, Images, place, plan_features, plan_images
from mmgraft.model.workflow import TEXT_WORKFLOW, Workflow
from mmgraft.vision.plan import Plan
from mmgraft.vision.towers.base import VisionTower


class GraftedConfig(PreTrainedConfig):
    """A thin shell around the base's own config, which caches and masks are made from."""

    model_type = "mmgraft"

    def __init__(self, base_config: PreTrainedConfig | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.base_config = base_config
        if base_config is not None:
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id"):
                setattr(self, name, getattr(base_config, name, None))
            for name in ("bos_token_id", "eos_token_id", "tie_word_embeddings"):
                setattr(self, name, getattr(base_config, name, None))

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Return the base's config."""
        base = getattr(self, "base_config", None)  # not set yet while transformers checks a config
        return self if base is None else base


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
        workflow.graft.check_attention(str(self.base.config._attn_implementation))
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

    def image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """The tower's features, without a gradient.

        Args:
            pixel_values: From the tower's ``preprocess``.
            image_sizes: ``(images, 2)``, width and height, where the tower's plan depends on them.

        Returns:
            ``(sum of entries, tower width)``, image after image; of a tower with one plan for all
            images ``(images, entries, tower width)``.
        """
        tower = self.vision_tower
        if tower is None:
            raise UsageError("this model was loaded without its vision tower: give image_features.")
        pixels = pixel_values.to(device=tower.device, dtype=tower.dtype)
        with torch.no_grad():
            if tower.fixed_plan is not None:
                return tower(pixels)
            return tower.encode(pixels, plan_images(tower, len(pixels), image_sizes))

    def images_in(
        self, given: GivenImages, names: Sequence[str], positions: Sequence[int]
    ) -> Images | None:
        """The images of a batch, held against the image positions of its rows.

        Args:
            given: What the caller gave.
            names: Workflow of each row.
            positions: Image positions of each row.

        Raises:
            UsageError: Images and positions do not match.
        """
        if not given.any:
            if any(positions):
                raise UsageError(
                    f"{sum(positions)} image positions but no image: give pixel_values or "
                    "image_features."
                )
            return None

        def counts(row: int, plan: Plan) -> int:
            if names[row] == TEXT_WORKFLOW:
                raise UsageError(f"row {row} runs the text workflow, which takes no images.")
            return self.workflow(names[row]).projector.counts(plan)

        images = given.features
        if not isinstance(images, Images):
            features = images
            if features is None:
                assert given.pixels is not None
                features = self.image_features(given.pixels, given.sizes)
            plans = plan_features(self.vision_tower, features, given.sizes)
            if given.rows is None or given.lengths is None:
                rows = place(plans, positions, counts)
                lengths = [counts(row, plan) for row, plan in zip(rows, plans, strict=True)]
            else:
                rows, lengths = given.rows.tolist(), given.lengths.tolist()
            images = Images(features, plans, rows, lengths)
        images.check(positions, counts)
        return images
