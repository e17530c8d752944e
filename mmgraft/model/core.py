"""State that the parts of :class:`GraftedModel` share: base, tower, workflows, trained groups."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from typing_extensions import Self

from mmgraft.anatomy import Anatomy, examine
from mmgraft.data.chat.answers import Answers
from mmgraft.errors import UsageError
from mmgraft.model.auto.config import GraftedConfig
from mmgraft.model.cache import extend
from mmgraft.model.images import GivenImages, Images, place, plan_features, plan_images
from mmgraft.model.workflow import TEXT_WORKFLOW, Workflow
from mmgraft.vision.plan import Plan
from mmgraft.vision.towers.base import VisionTower

BASE_GROUP = "base"


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
        if workflows:
            config.image_token_id = workflows[0].record.image_token.id
        super().__init__(config)
        self.base = base
        self.vision_tower = vision_tower
        self.anatomy: Anatomy = examine(base) if anatomy is None else anatomy
        self.workflows = nn.ModuleDict()
        self.default_workflow = workflows[0].name if workflows else "mm"
        self._takes_positions = self.anatomy.takes_positions
        self._packs: dict[tuple[str, int], str | None] = {}  # why rows cannot be packed
        self.gradient_checkpointing = False
        self.in_step = False  # see mmgraft.model.sharded
        self._only_text = False
        self.answers: Answers | None = None  # what ends them; known once there is a processor
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

    def _extend(self, cache: Cache) -> None:
        """Give a cache the slots of all workflows."""
        slots = [i for w in self._workflow_list() for i in w.graft.slot_layers()]
        extend(cache, self.anatomy.num_layers, slots)

    @property
    def _continuing(self) -> list[str]:
        """Return the workflows that go on from a cache of text."""
        return [one.name for one in self._workflow_list() if one.graft.continues_text]

    @property
    def names(self) -> list[str]:
        """Return the names of the workflows beside ``text``, in order."""
        return list(self.workflows)

    def workflow(self, name: str | None = None) -> Workflow:
        """Return a workflow by name (default: the first)."""
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
        """Return the base's."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the base's."""
        return cast(nn.Module, self.base.get_output_embeddings())

    def image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """Return the tower's features, without a gradient.

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
        """Return the images of a batch, checked against the image positions of its rows.

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
        given.check(len(names), self._workflow_list()[0].projector.in_features)

        def counts(row: int, plan: Plan) -> int:
            if names[row] == TEXT_WORKFLOW:
                raise UsageError(f"row {row} runs the text workflow, which takes no images.")
            return self.workflow(names[row]).positions(plan)

        images = given.image_features
        if not isinstance(images, Images):
            features = images
            if features is None:
                assert given.pixel_values is not None
                features = self.image_features(given.pixel_values, given.image_sizes)
            plans = plan_features(self.vision_tower, features, given.image_sizes)
            if given.image_rows is None or given.image_lengths is None:
                rows = place(plans, positions, counts)
                lengths = [counts(row, plan) for row, plan in zip(rows, plans, strict=True)]
            else:
                rows, lengths = given.image_rows.tolist(), given.image_lengths.tolist()
            if len(rows) != len(plans):
                raise UsageError(
                    f"{len(plans)} images were given, and image_rows and image_lengths are of "
                    f"{len(rows)}: give one entry an image."
                )
            images = Images(features, plans, rows, lengths)
        images.check(positions, counts)
        pairs = zip(images.rows, images.plans, strict=True)
        images.counts = [self.workflow(names[n]).projector.counts(plan) for n, plan in pairs]
        return images

    # -- what is trained ------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set training mode for the parts that are trained; frozen ones stay in eval mode."""
        nn.Module.train(self, False)
        if mode:
            self.training = True
            for part in self._parts():
                if any(parameter.requires_grad for parameter in part.parameters()):
                    part.train(True)
        return self

    def _parts(self) -> Iterable[nn.Module]:
        yield self.base
        for workflow in self._workflow_list():
            yield workflow.projector
            yield from workflow.graft.children()

    @property
    def base_is_trained(self) -> bool:
        """Return whether any weight of the base is trained; text then is no longer the base's."""
        return any(parameter.requires_grad for parameter in self.base.parameters())

    def groups(self, workflow: str | None = None) -> dict[str, list[nn.Parameter]]:
        """Parameters by group name: ``projector``, ``graft``, the graft's own groups, ``base``."""
        found = self.workflow(workflow).groups()
        return {**found, BASE_GROUP: list(self.base.parameters())}

    def set_trainable(self, groups: Sequence[str], workflow: str | None = None) -> list[str]:
        """Train exactly these groups, with fp32 parameters, and freeze the rest.

        Args:
            groups: Names from :meth:`groups`. A group that this graft does not have (an embedding
                that it shares with the base) is refused.
            workflow: Whose groups; default: the first.

        Returns:
            Names of the trained parameters.

        Raises:
            UsageError: An unknown group, a method that may not be trained, or ``base`` in 4-bit.
        """
        known = self.groups(workflow)
        for name in groups:
            if name not in known:
                raise UsageError(
                    f"this graft has no parameters called {name!r}; it has: "
                    f"{', '.join(sorted(n for n, p in known.items() if p))}."
                )
        chosen = self.workflow(workflow).graft
        if chosen.promises.training:
            raise UsageError(f"{chosen.method} is not trained: {chosen.promises.training}.")
        if BASE_GROUP in groups and self.quantized:
            raise UsageError(
                "a base in 4-bit cannot be trained: its weights are rounded. Load it without "
                "quantization, or keep it frozen and train the graft."
            )
        self.requires_grad_(False)
        for name in groups:
            for parameter in known[name]:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        for workflow_ in self._workflow_list():
            workflow_.graft.tie()
        self.train(self.training)
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    @property
    def quantized(self) -> bool:
        """Return whether the base is held in 4-bit."""
        return bool(getattr(self.base, "is_quantized", False))

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute each decoder layer, with the graft's part of it, in the backward pass."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self.gradient_checkpointing = False

    def touch(self) -> Tensor:
        """Return a zero that depends on every trained parameter, so that every rank has all
        gradients.
        """
        total = torch.zeros((), device=self.device)
        for parameter in self.parameters():
            if parameter.requires_grad:
                total = total + parameter.flatten()[0].float().to(total.device) * 0
        return total
