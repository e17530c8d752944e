"""Bytes of the tensors that live at any moment of a computation that computes nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

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
