"""Whole tensors from those that several processes hold in pieces."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def is_piece(tensor: Tensor) -> bool:
    """Tell whether this process holds a part of the tensor (a ``DTensor``)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gathered(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Gather tensors by name, whole and in main memory where they were in pieces.

    All processes must call this together, with the same names in the same order. They are gathered
    one by one, so that a process that keeps none never holds more than one.

    Args:
        tensors: Those that are whole stay where and what they are.
        keep: False gives an empty dict.
    """
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            whole = _whole(tensor)
            seen[id(tensor)] = whole if keep else tensor
        if keep:
            found[name] = seen[id(tensor)]
    return found


def like(whole: Tensor, other: Tensor) -> Tensor:
    """Split a whole tensor that every process has into the same pieces as another."""
    if not is_piece(other):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    moved = whole.to(other.device)
    return distribute_tensor(moved, other.device_mesh, other.placements, src_data_rank=None)


def _whole(tensor: Tensor) -> Tensor:
    plain = tensor.detach()
    if is_piece(plain):
        return plain.full_tensor().cpu()  # type: ignore[attr-defined]
    return plain
