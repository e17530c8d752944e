"""A grafted model of the right shapes without values, and its base as if in 4-bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from mmgraft.anatomy import get_path, skeleton
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import build_workflow
from mmgraft.model.modeling import GraftedModel

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
