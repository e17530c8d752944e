"""Find where the host waits for a make-believe card, and the kernels its attention would take."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

INDEXED = {
    "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_",
    "aten::_index_put_impl_", "aten::_unsafe_index_put",
}  # fmt: skip
"""Operations on a card whose indices may lie on the CPU."""
_READ = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::equal",
    "aten::is_nonzero",
}  # fmt: skip
"""Operations whose result, or its shape, the host must know."""
_READ_VALUE = {
    "aten::masked_fill", "aten::masked_fill_", "aten::index_fill", "aten::index_fill_",
}  # fmt: skip
"""CUDA reads the value of these by `.item()` where it is a tensor of a card."""
_WITHOUT_KERNEL = {
    "aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::lift_fresh",
}  # fmt: skip
"""Operations that start no kernel, beside views."""

_HERE = str(Path(__file__).parent)
_PACKAGE = "mmgraft/"


@dataclass
class Card:
    """Record of the make-believe cards.

    Attributes:
        waits: How often the host waited, by reason and line of code.
        loose: Copies that it did not wait for.
        attention: Calls of torch's attention, by the kernel that an A100 would choose.
        started: Operations that start a kernel; an attention of torch's is one.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    loose: Counter[tuple[str, str]] = field(default_factory=Counter)
    attention: Counter[tuple[str, str]] = field(default_factory=Counter)
    started: int = 0

    @property
    def count(self) -> int:
        """Count how often the host waited."""
        return sum(self.waits.values())

    @contextmanager
    def counting(self) -> Iterator[Card]:
        """Count what happens in the block alone."""
        with counting() as found:
            yield found

    def report(self) -> str:
        """List waits and kernels of attention by line, the most frequent first."""
        rows = [(count, *key) for key, count in self.waits.most_common()]
        rows += [
            (n, f"attention: {kernel}", at) for (kernel, at), n in self.attention.most_common()
        ]
        return "\n".join(f"{count:5} {kind:32} {where}" for count, kind, where in rows)


_card = Card()
_in_attention = False


@contextmanager
def counting() -> Iterator[Card]:
    """Count into a new card while the block lasts."""
    global _card
    found, before = Card(), _card
    _card = found
    try:
        yield found
    finally:
        _card = before


def wait(reason: str, loose: bool = False) -> None:
    """Note that the host waits, or (loose) that it starts a copy and goes on."""
    (_card.loose if loose else _card.waits)[reason, line_of_code()] += 1


def note_operation(
    name: str, func: Any, args: Any, kwargs: dict[str, Any], to: torch.device | None
) -> None:
    """Note an operation, and whether it makes the host wait; `to` is where its result lies."""
    _card.started += not (func.is_view or name in _WITHOUT_KERNEL or _in_attention)
    if name in ("aten::_to_copy", "aten::copy_"):
        source = args[0] if name == "aten::_to_copy" else args[1]
        if source.is_cuda == (to is not None) or not source.numel():
            return
        loose = bool(kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:3] == (True,)))
        pageable = to is not None and loose and not getattr(source, "_pinned", False)
        kind = "copy to host" if to is None else "copy to card"
        wait(f"{kind}, not pinned" if pageable else kind, loose)
    elif name in _READ:
        wait(name.removeprefix("aten::").replace("_local_scalar_dense", "item"))
    elif name == "aten::repeat_interleave" and func._overloadname == "Tensor":
        if kwargs.get("output_size") is None:
            wait("repeat_interleave")
    elif name in INDEXED:
        _note_indices(name, args)
    elif name in _READ_VALUE and func._overloadname.endswith("Tensor") and args[-1].is_cuda:
        wait(f"{name.removeprefix('aten::')} by a tensor")


def _note_indices(name: str, args: Any) -> None:
    indices = [index for index in args[1] if index is not None]
    masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    number = "put" in name and args[2].numel() == 1 and not args[2].is_cuda
    if number and len(masks) == 1 == len(indices):
        return  # becomes masked_fill
    for _ in masks:
        wait("boolean mask" + (" (put)" if "put" in name else ""))
    for index in indices:
        if not index.is_cuda:
            wait("index on the CPU")


def line_of_code() -> str:
    """Find the line that runs: the innermost of mmgraft, with the library's line inside it."""
    frame: Any = sys._getframe(1)
    inner = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_HERE, "<")):
            short = _short(file)
            if short.startswith(_PACKAGE):
                return f"{short}:{frame.f_lineno}" + (f" (in {inner})" if inner else "")
            if not inner and not short.startswith(("torch/", "contextlib.py", "functools.py")):
                inner = f"{short}:{frame.f_lineno}"
        frame = frame.f_back
    return inner or "the backward pass"


@functools.cache
def _short(file: str) -> str:
    """Shorten a file's path to the one in its package."""
    _, found, rest = file.rpartition("/site-packages/")
    if found:
        return rest
    at = file.rfind(f"/{_PACKAGE}")
    return file[at + 1 :] if at >= 0 and "/tests/" not in file[at:] else file.rpartition("/")[2]


class Attention(TorchFunctionMode):
    """Note which kernel torch would run an attention of a card with."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        global _in_attention
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not args[0].is_cuda:
            return func(*args, **kwargs)
        _card.attention[kernel_of(*args, **kwargs), line_of_code()] += 1
        _card.started += 1
        _in_attention = True
        try:
            return func(*args, **kwargs)
        finally:
            _in_attention = False


def kernel_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    """Name the first kernel whose conditions a call meets, and what the faster ones did not like.

    After the checks of torch 2.11's `sdp_utils.cpp` that depend on the call, cuDNN's left out.
    """
    dtype = query.dtype
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    widths = {query.shape[-1], key.shape[-1], value.shape[-1]}
    same_heads = query.shape[1] == key.shape[1]
    why = {
        "mask": attn_mask is not None,
        "fp32": dtype == torch.float32,
        "widths differ": len(widths) > 1,
        "width > 256": max(widths) > 256,
        "heads differ": not same_heads and not enable_gqa,
    }
    reasons = ", ".join(name for name, holds in why.items() if holds)
    if not reasons:
        return "flash"
    if same_heads and not (attn_mask is not None and attn_mask.requires_grad):
        return f"efficient ({reasons})"
    return f"math ({reasons})"
