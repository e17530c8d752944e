"""One training step with shapes alone: the real code runs, and only bytes are counted.

A ledger holds the bytes of the tensors that live at any moment.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mmgraft.anatomy import decoder_layers
from mmgraft.errors import MMGraftError
from mmgraft.grafts.computing import as_if_on
from mmgraft.model.images import Images
from mmgraft.model.modeling import GraftedModel
from mmgraft.training.memory.stand_in import without_values
from mmgraft.vision.plan import Plan, Size
from mmgraft.vision.towers.base import VisionTower

_GROUPED = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)
"""The product of a mixture of experts. Only in bf16 does torch know its shape without values."""


class Ledger(TorchDispatchMode):
    """While the block lasts, every new storage is counted until it is freed.

    It stands on a ``FakeTensorMode``: floating point tensors have a shape and no values, so nothing
    is allocated, but every operation runs; what autograd keeps, what autocast copies and what a
    recomputation frees are counted as they happen. Whole numbers and truth values are computed
    in earnest, because the code reads them: ids, masks and positions are small.

    Args:
        known: Tensors that were there before and are not to be counted.

    Attributes:
        now: Bytes that live.
        peak: The most that lived at once.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._entries: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._entries[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # read tens of thousands of times
        out = _run(func, args, kwargs or {})
        tree_map_only(torch.Tensor, self._enter, out)
        return out

    def _enter(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            return tensor
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def cross_out(_: object) -> None:
            self.now -= size
            self._entries.pop(key, None)

        self._entries[key] = weakref.ref(storage, cross_out)
        return tensor


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(isinstance(tensor, FakeTensor) for tensor in given):
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _indices(args[1]))
        if func is _GROUPED and args[0].dtype != torch.bfloat16:
            halves = [one.bfloat16() for one in args[:2]]
            return func(*halves, *args[2:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)
    if not given:
        made = func(*args, **kwargs)
        if not isinstance(made, Tensor) or made.is_floating_point():
            return made
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _indices(indices: Any) -> list[Any]:
    """Turn masks in an index into lists of positions: how many a mask chooses is then known."""
    found: list[Any] = []
    for index in indices:
        known = isinstance(index, Tensor) and not isinstance(index, FakeTensor)
        if known and index.dtype == torch.bool:
            with unset_fake_temporarily():
                found += index.nonzero().unbind(-1)
        else:
            found.append(index)
    return found


@dataclass(frozen=True)
class Load:
    """One step: what its forward pass is given, and how it is computed.

    Attributes:
        rows: In the batch.
        length: Positions of the longest row, images counted.
        plans: Of the images of one row.
        supervised: Supervised tokens of a row.
        padded: Rows differ in length, so that attention gets a mask.
        width: Of the tower's features.
        dtype: Of the tower's features.
        precision: ``bf16`` computes under autocast.
        device: ``cuda`` or ``cpu``: whose path the code takes, and whose casts are made.
        checkpointing: Recompute layers in the backward pass.
        accumulates: Gradients of an earlier pass are held already.
        gradients_leave: Each gradient goes elsewhere as soon as it is made.
    """

    rows: int
    length: int
    plans: tuple[Plan, ...]
    supervised: int
    padded: bool
    width: int
    dtype: torch.dtype
    precision: str = "bf16"
    device: str = "cuda"
    checkpointing: bool = False
    accumulates: bool = False
    gradients_leave: bool = False


@dataclass(frozen=True)
class Step:
    """Bytes of one forward and backward pass, beside the weights.

    Attributes:
        kept: Held when the forward is done, for the backward to use.
        layers: Of these, what each decoder layer holds, with what the graft adds to it.
        peak: The most that is held at once, gradients with it.
    """

    kept: int
    layers: list[int]
    peak: int


_WIDENED = {
    "layer_norm", "group_norm", "pow", "__pow__", "__rpow__", "norm", "rsqrt", "reciprocal", "exp",
    "expm1", "log", "log2", "log10", "log1p", "softplus", "cosine_similarity", "normalize", "tan",
    "cosh", "sinh", "dist", "renorm",
}  # fmt: skip
"""Operations that CUDA's autocast computes in fp32 and a CPU's does not."""
_WIDE_RESULT = {"softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod"}
"""Operations that it gives an fp32 result without a copy of their input."""


class _CudaCasts(TorchFunctionMode):
    """Cast under a CPU's autocast what CUDA's casts to fp32: it is kept for the backward pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        if name in _WIDENED:
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        elif name in _WIDE_RESULT and _is_half(args[0]) and kwargs.get("dtype") is None:
            kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


def _is_half(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in (torch.bfloat16, torch.float16)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if _is_half(tensor) else tensor


def simulate(model: GraftedModel, load: Load) -> Step:
    """Run one step of a stage's model, opened for the stage; its parameters become fake ones.

    Args:
        model: On the meta device, with one workflow.
        load: The step.

    Raises:
        MMGraftError: This base computes sizes from values, so that it cannot run without them.
    """
    model.gradient_checkpointing = load.checkpointing
    bf16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=load.precision == "bf16")
    layers: list[int] = []
    try:
        with without_values(model), as_if_on(load.device), contextlib.ExitStack() as hooks:
            trained = [p for p in model.parameters() if p.requires_grad]
            ledger = hooks.enter_context(Ledger([*model.parameters(), *model.buffers()]))
            for parameter in trained:
                if load.accumulates:
                    parameter.grad = torch.empty_like(parameter)
                if load.gradients_leave:
                    leaves = parameter.register_post_accumulate_grad_hook(_drop_gradient)
                    hooks.callback(leaves.remove)
            for layer in decoder_layers(model.base, model.anatomy):
                _watch(layer, ledger, layers, hooks)
            hooks.enter_context(_CudaCasts() if load.device == "cuda" else contextlib.nullcontext())
            with bf16:
                loss = _loss(model, load)
            kept = ledger.now
            loss.backward()
            return Step(kept, layers, ledger.peak)
    except Exception as error:  # whatever a foreign forward may raise over missing values
        raise MMGraftError(
            f"the memory of {model.anatomy.class_name} cannot be estimated: "
            f"it does not run without values ({str(error).strip().partition(chr(10))[0]})"
        ) from error


def simulate_tower(
    tower: VisionTower, size: Size | None, plans: list[Plan], dtype: torch.dtype
) -> int:
    """Count the bytes that the tower needs at once to see images of one size."""
    one, *shape = tower.preprocess([Image.new("RGB", size or (64, 64))]).shape
    with without_values(tower, dtype):
        with Ledger([*tower.parameters(), *tower.buffers()]) as ledger, torch.no_grad():
            pixels = torch.empty(one * len(plans), *shape)
            tower.encode(pixels.to(dtype), plans)  # both live: pixels come in fp32
        return ledger.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _watch(
    layer: torch.nn.Module, ledger: Ledger, kept: list[int], hooks: contextlib.ExitStack
) -> None:
    before = [0]

    def enter(*_: Any) -> None:
        before[0] = ledger.now

    def leave(*_: Any) -> None:
        kept.append(ledger.now - before[0])

    hooks.callback(layer.register_forward_pre_hook(enter).remove)
    hooks.callback(layer.register_forward_hook(leave).remove)


def _loss(model: GraftedModel, load: Load) -> Tensor:
    shape = (load.rows, load.length)
    lengths = [model.workflow().positions(plan) for plan in load.plans]
    shown = sum(lengths)
    real = torch.ones(shape, dtype=torch.long)
    if load.padded:
        real[min(1, load.rows - 1) :, -1] = 0
    kinds = torch.zeros(shape, dtype=torch.long)
    kinds[:, :shown] = 1
    labels = torch.full(shape, -100)
    labels[:, max(1, load.length - load.supervised) :] = 0
    features = None
    if shown:
        plans = list(load.plans * load.rows)
        entries = sum(plan.entries for plan in plans)
        features = Images(
            torch.empty(entries, load.width, dtype=load.dtype),
            plans,
            [row for row in range(load.rows) for _ in load.plans],
            lengths * load.rows,
        )
    out = model(
        input_ids=torch.zeros(shape, dtype=torch.long),
        attention_mask=real,
        mm_token_type_ids=kinds,
        labels=labels,
        image_features=features,
    )
    return out.loss
