"""A stand-in for the `flash_attn` package, for the make-believe card.

It computes by plain products, and refuses what the package refuses: another dtype than half
precision, heads above 256, queries, keys and values of different widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as flash


@dataclass
class Calls:
    """The head width of every call."""

    widths: list[int] = field(default_factory=list)


@contextmanager
def pretend_flash() -> Iterator[Calls]:
    """Let `flash_attention_2` be installed while the block lasts."""
    calls = Calls()

    def imports(implementation: str | None, *_: Any, **__: Any) -> tuple[Any, ...]:
        if implementation != "flash_attention_2":  # as where it is looked for on the Hub
            raise ValueError(f"no flash attention implementation at {implementation}")
        return _whole(calls), _pieces(calls), None, flash._pad_input, flash._unpad_input

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(flash, "_lazy_imports", imports))
        stack.enter_context(mock.patch.object(flash, "_loaded_implementation", None))
        stack.enter_context(
            mock.patch.object(PreTrainedModel, "_flash_attn_can_dispatch", return_value=True)
        )
        yield calls


def _whole(calls: Calls) -> Any:
    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        _check(calls, q, k, v)
        return _attend(q, k, v, softmax_scale, causal, window_size[0])

    return flash_attn_func


def _pieces(calls: Calls) -> Any:
    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        _check(calls, q, k, v)
        ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
        out, start = [], (0, 0)
        for end in list(ends)[1:]:
            own_q, own_k = slice(start[0], end[0]), slice(start[1], end[1])
            piece = (q[None, own_q], k[None, own_k], v[None, own_k])
            out.append(_attend(*piece, softmax_scale, causal, window_size[0])[0])
            start = end
        return torch.cat(out)

    return flash_attn_varlen_func


def _check(calls: Calls, *tensors: Tensor) -> None:
    if not all(tensor.is_cuda for tensor in tensors):
        raise RuntimeError("FlashAttention only runs on CUDA")
    if {tensor.dtype for tensor in tensors} - {torch.float16, torch.bfloat16}:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    widths = {tensor.shape[-1] for tensor in tensors}
    if len(widths) > 1 or max(widths) > 256:
        raise RuntimeError(f"FlashAttention does not support head dimensions {widths}")
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    calls.widths.append(max(widths))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: int
) -> Tensor:
    """Attend, ``(b, s, n, d)``; causal from the lower right corner, as of version 2.1."""
    scale = scale or q.shape[-1] ** -0.5
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2).float() for x in (k, v))
    scores = torch.einsum("bqnd,bknd->bnqk", q.float(), k) * scale
    at = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    keys = torch.arange(k.shape[1], device=q.device)
    if causal:
        scores = scores.masked_fill(keys > at, float("-inf"))
    if window >= 0:
        scores = scores.masked_fill(keys < at - window, float("-inf"))
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1).nan_to_num(), v).to(q.dtype)
