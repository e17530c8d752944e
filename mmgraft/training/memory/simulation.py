"""One training step with shapes alone: the real code runs, and only bytes are counted.

It runs on a grafted model of the right shapes without values, whose base is as if in 4-bit where
that is asked for. A ledger holds the bytes of the tensors that live at any moment.
"""

import contextlib
import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from mmgraft.anatomy import decoder_layers, get_path, skeleton
from mmgraft.errors import MMGraftError
from mmgraft.frozen import Frozen
from mmgraft.grafts.computing import as_if_on
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import build_workflow
from mmgraft.model.images import Images
from mmgraft.model.modeling import GraftedModel
from mmgraft.vision.plan import Plan, Size
from mmgraft.vision.towers.base import VisionTower

_BLOCK, _NESTED = 64, 256  # numbers that share a constant; constants that share one
_TABLES = 16 * 4 + 256 * 4 + 4  # the two code tables of a layer, and the constants' offset


def meta_model(
    record: GraftFile,
    config: PreTrainedConfig,
    width: int,
    dtype: torch.dtype,
    quantization: str | None = None,
    attention: str | None = None,
) -> GraftedModel:
    """Make the model that training loads, on the meta device: base in ``dtype``, graft in fp32.

    Args:
        record: The graft's.
        config: The base's.
        width: Of the tower's features.
        dtype: Of the base.
        quantization: ``nf4`` replaces the base's linear layers as bitsandbytes does.
        attention: Its kernel; flash attention, which wants its package, holds what sdpa does.
    """
    if attention in ("eager", "sdpa"):
        config = copy.deepcopy(config)
        config._attn_implementation = attention
    base = skeleton(config).to(dtype)  # pyright: ignore[reportArgumentType]
    base.requires_grad_(False)
    workflow = build_workflow(record, base, width).float().requires_grad_(False)
    model = GraftedModel(base, None, [workflow])
    if quantization is not None:
        _hold_in_4bit(model, dtype)
    return model


def weights_of(module: nn.Module) -> dict[str, int]:
    """Count the bytes of parameters by dtype, each tensor once; of 4-bit layers under ``nf4``."""
    found: dict[str, int] = {}
    for parameter in module.parameters():
        packed = parameter.dtype == torch.uint8
        name = "nf4" if packed else str(parameter.dtype).removeprefix("torch.")
        found[name] = found.get(name, 0) + parameter.nbytes
    return found


def count_of(module: nn.Module) -> int:
    """Count the numbers in all parameters, those of 4-bit layers as what they stand for."""
    packed = [part for part in module.modules() if isinstance(part, FourBitLinear)]
    whole = sum(one.numel() for one in module.parameters() if one.dtype != torch.uint8)
    return whole + sum(one.in_features * one.out_features for one in packed)


class FourBitLinear(nn.Module):
    """Takes the memory of bitsandbytes' nf4 layer with double quantisation, and computes nothing.

    Two numbers a byte, a one-byte constant for 64 numbers, an fp32 one for 256 of these. Forwards
    and backwards the weights are unpacked for the product and thrown away again.
    """

    def __init__(self, in_features: int, out_features: int, bias: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        size = in_features * out_features
        blocks = -(-size // _BLOCK)
        self.nbytes = -(-size // 2) + blocks + 4 * -(-blocks // _NESTED) + _TABLES
        packed = torch.empty(self.nbytes, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``."""
        out: Tensor = _FourBit.apply(x.to(self.dtype), self).to(x.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def unpacked(self) -> Tensor:
        """Return the weights ``(out, in)``."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype)


class _FourBit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FourBitLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpacked())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.unpacked().to(grads[0].dtype), None


def _hold_in_4bit(model: GraftedModel, dtype: torch.dtype) -> None:
    head = get_path(model.base, model.anatomy.head_path)
    for name, part in list(model.base.named_modules()):
        if part is head or not isinstance(part, nn.Linear | Conv1D):
            continue
        turned = isinstance(part, Conv1D)
        rows, columns = part.weight.shape
        sizes = (rows, columns) if turned else (columns, rows)
        owner, _, leaf = name.rpartition(".")
        bias = part.bias
        setattr(model.base.get_submodule(owner), leaf, FourBitLinear(*sizes, bias, dtype))


@contextmanager
def without_values(module: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Make tensors fake ones of the CPU while the block lasts; a module's stay so.

    ``dtype`` is what its floating point tensors get; None leaves theirs.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        made: dict[Tensor, Tensor] = {}  # so that tied tensors stay tied
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        if tensor not in made:
                            made[tensor] = _empty_like(tensor, dtype)
                        held[name] = made[tensor]  # pyright: ignore[reportArgumentType]
        yield


def _empty_like(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    empty = torch.empty(tensor.shape, dtype=wanted)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


#: The product of a mixture of experts. Only in bf16 does torch know its shape without values.
_GROUPED = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)


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


class Load(Frozen):
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


class Step(Frozen):
    """Bytes of one forward and backward pass, beside the weights.

    Attributes:
        kept: Held when the forward is done, for the backward to use.
        layers: Of these, what each decoder layer holds, with what the graft adds to it.
        peak: The most that is held at once, gradients with it.
    """

    kept: int
    layers: list[int]
    peak: int


#: Operations that CUDA's autocast computes in fp32 and a CPU's does not.
_WIDENED = {
    "layer_norm", "group_norm", "pow", "__pow__", "__rpow__", "norm", "rsqrt", "reciprocal", "exp",
    "expm1", "log", "log2", "log10", "log1p", "softplus", "cosine_similarity", "normalize", "tan",
    "cosh", "sinh", "dist", "renorm",
}  # fmt: skip
#: Operations that it gives an fp32 result without a copy of their input.
_WIDE_RESULT = {"softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod"}


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
