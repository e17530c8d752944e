"""Kernels that a CPU makes for products in half precision: one for each shape, kept to be reused.

oneDNN writes the machine code of a product when its shape is first met. A step of rows of another
length meets other shapes, so that a training of uneven rows goes on making kernels until oneDNN's
store of them is full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

KERNEL = 570_000
"""Bytes of one, measured: the two buffers of 256 KiB that its code is written into, and more."""
MOST = 1024
"""How many oneDNN keeps."""

_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_WEIGHTS: dict[Any, int] = {
    _aten.mm.default: 1,
    _aten.addmm.default: 1,
    _aten.bmm.default: 1,
    _aten.baddbmm.default: 1,
    _ATTENTION: 6,
}
"""Kernels of an operation. Attention is products of blocks, whose last one is cut by the length;
six for each length is what its backward pass was seen to make, its forward pass makes no more."""


class Kernels:
    """The different products of a computation."""

    def __init__(self) -> None:
        self._met: dict[Any, int] = {}

    def see(self, operation: Any, args: Any) -> None:
        """Take down what an operation is given."""
        weight = _WEIGHTS.get(operation)
        if weight is None:
            return
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if not given or given[0].dtype != torch.bfloat16:
            return
        if operation is _ATTENTION:
            shapes: Any = [tensor.shape[-2:] for tensor in given[1:3]]  # of queries and keys
        else:
            shapes = [(*tensor.shape, _is_turned(tensor)) for tensor in given]
        self._met[operation, tuple(tuple(shape) for shape in shapes)] = weight

    @property
    def count(self) -> int:
        """How many kernels were needed."""
        return sum(self._met.values())


def _is_turned(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and tensor.stride(-1) != 1


def kernel_bytes(count: int, different: int) -> int:
    """Bytes of the kernels of a training.

    Args:
        count: Those of one pass.
        different: Passes whose rows have other lengths.
    """
    return KERNEL * min(MOST, count * different)
