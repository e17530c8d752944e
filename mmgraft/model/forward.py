"""The inputs of the forward, and a base that runs with the grafts of the active workflows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils.operations import send_to_device
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from mmgraft.anatomy import Anatomy, decoder_layers, get_path
from mmgraft.data.batches.sequences import learned_within, number
from mmgraft.errors import UsageError
from mmgraft.grafts.base import Graft, Pass, select
from mmgraft.model.files.parts import execution_device
from mmgraft.model.images import GivenImages
from mmgraft.model.kernels.activations import activations_again
from mmgraft.model.kernels.compiling import is_compiled
from mmgraft.model.kernels.quantization import gradients_through_packed
from mmgraft.model.packing import refuse_beside
from mmgraft.model.sharded import join
from mmgraft.patching import patched_forward


@dataclass
class Inputs:
    """The parameters of :meth:`GraftedModel.forward`; ``images`` are five of them.

    Attributes:
        input_ids: ``(b, s)``; at image positions any id of the vocabulary.
        attention_mask: ``(b, past + s)``, 0 at padding on either side.
        position_ids: ``(b, s)``; by default each token's own position, padding not counted. Every
            position of an image counts, also where a graft gives all of them one number.
        past_key_values: A cache; it also remembers each row's workflow.
        inputs_embeds: ``(b, s, h)`` instead of ``input_ids``.
        labels: ``(b, s)``, -100 where nothing is supervised. The loss runs the head on supervised
            positions only, and ``logits`` is then None.
        mm_token_type_ids: ``(b, s)``, 1 at image positions.
        images: ``pixel_values``, ``image_features``, ``image_sizes``, ``image_lengths`` and
            ``image_rows``; see :class:`mmgraft.model.images.GivenImages`.
        workflow: A workflow for all rows, or one a row; by default rows with an image run the
            model's default workflow and the others ``text``.
        use_cache: Return a cache.
        logits_to_keep: Compute logits of the last positions only.
        num_items_in_batch: Supervised tokens that the summed loss is divided by; by default those
            of this batch.
        segments: ``(b, s)``, for several rows in one sequence: 0 at padding, another number for
            each row than its neighbours'. No row sees another, each one's positions begin at 0;
            mask, positions and cache are not taken beside it.
        options: For the base.

    Raises:
        UsageError: Neither ids nor embeddings, or segments that do not go with them.
    """

    input_ids: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None
    past_key_values: Cache | None
    inputs_embeds: Tensor | None
    labels: Tensor | None
    mm_token_type_ids: Tensor | None
    images: GivenImages
    workflow: str | Sequence[str] | Tensor | None
    use_cache: bool | None
    logits_to_keep: int | Tensor
    num_items_in_batch: Tensor | int | None
    segments: Tensor | None
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if self.input_ids is None and self.inputs_embeds is None:
            raise UsageError("give input_ids or inputs_embeds.")
        if self.segments is not None:
            refuse_beside(self.segments, self.batch, self.past_key_values)

    @property
    def new(self) -> Tensor:
        """Ids or embeddings."""
        found = self.input_ids if self.input_ids is not None else self.inputs_embeds
        assert found is not None
        return found

    @property
    def batch(self) -> tuple[int, int]:
        """Rows and new positions."""
        return self.new.shape[0], self.new.shape[1]

    @property
    def real(self) -> Tensor | None:
        """0 at padding; None where there is none."""
        return self.attention_mask if self.segments is None else self.segments

    def number_rows(self) -> None:
        """Tell the rows of the sequences apart, and let their positions and labels begin anew."""
        assert self.segments is not None
        self.segments, self.position_ids = number(self.segments.to(self.new.device))
        if self.labels is not None:
            self.labels = learned_within(self.labels, self.segments)
        self.attention_mask, self.use_cache = None, False


@dataclass
class Active:
    """A graft in this pass, and the rows that run it (None: all)."""

    graft: Graft
    gate: Tensor | None  # (b,)


@dataclass
class _Run:
    active: Sequence[Active]
    state: Pass | None
    checkpointing: bool
    through_4bit: bool = False
    in_step: bool = False
    carries: list[Tensor | None] = field(default_factory=list)


@contextmanager
def running(
    base: PreTrainedModel,
    anatomy: Anatomy,
    active: Sequence[Active],
    state: Pass | None,
    checkpointing: bool = False,
    in_step: bool = False,
) -> Iterator[None]:
    """While the block lasts, ``base(...)`` runs the active grafts; afterwards it is untouched.

    With ``checkpointing`` each decoder layer, with what a graft adds to it, is computed again in
    the backward pass instead of keeping its activations. ``state`` is None for the base alone.
    ``in_step``: see :mod:`mmgraft.model.sharded`.
    """
    active = [item for item in active if item.graft.active]
    through_4bit = torch.is_grad_enabled() and bool(getattr(base, "is_quantized", False))
    run = _Run(active, state, checkpointing, through_4bit, in_step, [None] * len(active))
    every_layer = checkpointing or (through_4bit and state is not None)
    with ExitStack() as stack:
        stack.enter_context(_one_precision(base, active))
        if state is not None:
            for item in active:
                item.graft.begin(state)
        if torch.is_grad_enabled() and not checkpointing and not is_compiled(base, anatomy):
            grafts = [item.graft for item in active]
            stack.enter_context(activations_again([*decoder_layers(base, anatomy), *grafts]))
        for index, layer in enumerate(decoder_layers(base, anatomy)):
            if every_layer or any(item.graft.acts_on(index) for item in active):
                stack.enter_context(patched_forward(layer, partial(_layer, run, index, layer)))
        for path, name in ((anatomy.norm_path, "norm"), (anatomy.head_path, "head")):
            owners = [item for item in active if getattr(item.graft, name) is not None]
            if owners and path is not None:
                stack.enter_context(
                    patched_forward(get_path(base, path), partial(_own, owners, name))
                )
        yield


def _one_precision(base: PreTrainedModel, active: Sequence[Active]) -> AbstractContextManager[Any]:
    """Autocast, where a graft in training (fp32) is asked beside a base in half precision."""
    dtype, kind = base.dtype, base.device.type
    if dtype == torch.float32 or torch.is_autocast_enabled(kind):
        return nullcontext()
    if all(p.dtype == dtype for item in active for p in item.graft.parameters()):
        return nullcontext()
    return torch.autocast(kind, dtype=dtype)


def _layer(
    run: _Run, index: int, layer: nn.Module, original: Any, *args: Any, **kwargs: Any
) -> Any:
    """One base layer with its grafts, checkpointed or not."""
    if run.state is None:
        return checkpoint(original, *args, use_reentrant=False, **kwargs)
    if args:
        hidden, args = args[0], args[1:]
    else:
        hidden = kwargs.pop("hidden_states")
    device = execution_device(layer)
    if device is not None:  # as the base's own hook does, for the base's layer alone
        hidden, args = hidden.to(device), cast(Any, send_to_device(args, device))
        kwargs = cast(Any, send_to_device(kwargs, device, skip_keys="past_key_values"))
        run.carries = [None if carry is None else carry.to(device) for carry in run.carries]
    if run.in_step:  # outside the part that is computed again: its gradients come after all others
        hidden = join(hidden, _parameters_at(run, index))

    def forward(hidden: Tensor, *carries: Tensor | None) -> tuple[Any, list[Tensor | None]]:
        return _with_grafts(run, index, layer, hidden, carries, original, args, kwargs)

    if run.checkpointing:
        out, run.carries = checkpoint(forward, hidden, *run.carries, use_reentrant=False)
    else:
        out, run.carries = forward(hidden, *run.carries)
    return out


def _with_grafts(
    run: _Run,
    index: int,
    layer: nn.Module,
    hidden: Tensor,
    carries: Sequence[Tensor | None],
    original: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> tuple[Any, list[Tensor | None]]:
    """Return a layer's output with what the grafts add to it, and what they carry to the next
    layer.
    """
    assert run.state is not None
    here = run.state.on(hidden.device)
    acting = [n for n, item in enumerate(run.active) if item.graft.acts_on(index)]
    with ExitStack() as stack:
        if run.through_4bit:
            stack.enter_context(gradients_through_packed(layer))
        for item in (run.active[n] for n in acting):
            stack.enter_context(item.graft.layer_context(index, layer, hidden, here, item.gate))
        given = original(hidden, *args, **kwargs)
    out, rest = (given[0], given[1:]) if isinstance(given, tuple) else (given, None)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        result = module(x, *args, **kwargs)
        return result[0] if isinstance(result, tuple) else result

    carried = list(carries)
    for at in acting:
        item = run.active[at]
        new, carried[at] = item.graft.after_layer(index, call, hidden, out, here, carries[at])
        out = out if new is out else select(item.gate, new, out)
    return (out if rest is None else (out, *rest)), carried


def _parameters_at(run: _Run, index: int) -> list[nn.Parameter]:
    """Return the parameters of what the active grafts run at a layer."""
    return [
        parameter
        for item in run.active
        for place, piece in item.graft.layer_modules()
        if place == index
        for parameter in piece.parameters()
    ]


def _own(owners: Sequence[Active], name: str, original: Any, x: Tensor) -> Tensor:
    """Return a workflow's own norm or head for its rows, the base's for the others."""

    def own(item: Active) -> Tensor:
        module = getattr(item.graft, name)
        place = next(module.parameters(), x).device  # OLMo's norm has no parameters
        return module(x.to(place))

    if len(owners) == 1 and owners[0].gate is None:
        return own(owners[0])
    out = original(x)
    for item in owners:
        out = select(item.gate, own(item), out)
    return out
