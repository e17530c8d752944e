"""A frozen base in 4-bit: nf4 with double quantisation, through bitsandbytes."""

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from mmgraft.errors import UsageError
from mmgraft.patching import patched_forward

KINDS = ("nf4",)


def quantization_config(
    kind: str | None, dtype: torch.dtype, storage: torch.dtype | None = None
) -> BitsAndBytesConfig | None:
    """Return transformers' config for a kind of quantisation; None stays None.

    Args:
        kind: ``"nf4"``.
        dtype: To compute in.
        storage: What the packed bytes are kept as, bf16 where FSDP2 shares them out; None: bytes.

    Raises:
        UsageError: An unknown kind, bitsandbytes missing, or a device that it does not run on.
    """
    if kind is None:
        return None
    if kind not in KINDS:
        raise UsageError(f"quantization {kind!r} is not known; use {', '.join(KINDS)} or none.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("a 4-bit base needs bitsandbytes: pip install 'mmgraft[4bit]'")
    if not torch.cuda.is_available() and torch.backends.mps.is_available():
        raise UsageError(
            "bitsandbytes has no 4-bit kernels for MPS: use CUDA or the CPU (--device cpu), "
            "or leave --quantization out."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def assert_unquantized(module: nn.Module, where: str) -> None:
    """Make sure that nothing in a tower, projector or graft was quantised.

    Raises:
        UsageError: Names the module that was.
    """
    for name, child in module.named_modules():
        if type(child).__module__.startswith("bitsandbytes"):
            raise UsageError(f"{where}.{name} was quantised; only the base may be.")


def leave_file(base: nn.Module) -> None:
    """Give what is not packed memory of its own, on the CPU.

    As loaded, embedding and norms are views of the base's mapped file, and keep every page of it
    that was read resident: those of the weights that are held in 4-bit too.
    """
    for tensor in (*base.parameters(), *base.buffers()):
        if tensor.device.type == "cpu" and not hasattr(tensor, "quant_state"):
            tensor.data = tensor.data.clone()


@contextmanager
def gradients_through_packed(module: nn.Module) -> Iterator[None]:
    """Let gradients flow through 4-bit layers that bitsandbytes has packed, in the block.

    On a CPU with bfloat16 instructions it packs a layer's weights for a faster kernel at the first
    forward without gradients, an evaluation for instance. That kernel has no backward pass: a
    training step after it would lose, without a word, every gradient that passes such a layer.
    """
    with ExitStack() as stack:
        for child in module.modules():
            if _packed(child):
                stack.enter_context(patched_forward(child, _forward_packed(child)))
        yield


def _packed(module: nn.Module) -> bool:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _forward_packed(module: nn.Module) -> Any:
    def forward(original: Any, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return original(x)
        return _ThroughPacked.apply(x, module, original)

    return forward


class _ThroughPacked(torch.autograd.Function):
    """The packed kernel forwards; backwards the product with the weights that it holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, original: Any) -> Tensor:
        ctx.module = module
        return original(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ _unpacked(ctx.module).to(grads[0].dtype), None, None


def _unpacked(module: nn.Module) -> Tensor:
    """Return the weights ``(out, in)`` of a packed layer, which stays as it is."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

    weight: Any = module.weight
    state = copy.copy(weight.quant_state)
    state.original_nested = False  # the scales are whole already
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.t().reshape(-1).float()
    return dequantize_4bit(data, state)
