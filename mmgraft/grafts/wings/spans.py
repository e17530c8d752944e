"""Where a mask is nothing but causal, piece by piece: kernels skip what lies in the future there.

A fused kernel with an explicit mask computes all ``s x s`` scores; told that it is causal, half of
them. A padded batch, or several rows in one sequence, is causal inside each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Spans = Sequence[Sequence[tuple[int, int]]]
"""Of each row of a batch: where its causal pieces begin and end, in order."""


def causal_spans(mask: Tensor, padding: Tensor) -> Spans | None:
    """The pieces that make up a mask, or None where it is not made of such.

    Args:
        mask: ``(b, 1, s, s)``, true where a query may look.
        padding: ``(b, s)``, true at queries whose output does not matter.
    """
    if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return None
    seen = mask[:, 0].expand(padding.shape[0], -1, -1)
    index = torch.arange(seen.shape[-1], device=mask.device)
    first = seen.to(torch.uint8).argmax(-1)  # (b, s) the first key that a query sees
    own = seen.diagonal(dim1=1, dim2=2)
    last = index[-1] - seen.flip(-1).to(torch.uint8).argmax(-1)
    causal = own & (last == index) & (seen.sum(-1) == index - first + 1)
    starts = torch.zeros_like(causal)
    starts[:, 1:] = first[:, 1:] != first[:, :-1]
    if not bool((padding | (causal & (~starts | (first == index)))).all()):
        return None
    found = [_pieces(*row) for row in zip(first.tolist(), padding.tolist(), strict=True)]
    return None if any(pieces is None for pieces in found) else found  # type: ignore[return-value]


def _pieces(first: list[int], padding: list[bool]) -> list[tuple[int, int]] | None:
    found: list[tuple[int, int]] = []
    for at, (start, padded) in enumerate(zip(first, padding, strict=True)):
        if padded:
            continue
        if found and found[-1] == (start, at):
            found[-1] = (start, at + 1)
        elif start == at:
            found.append((start, at + 1))
        else:
            return None  # padding in between that later queries see
    return found


def over_spans(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    spans: Spans,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Run a causal attention on each piece; exactly 0 at positions outside of all.

    Args:
        attend: Queries, keys and values ``(1, n, c, d)`` of a piece to its output ``(1, c, n, d)``.
        spans: The pieces.
        query: ``(b, n, s, d)``.
        key: ``(b, kv heads, s, d)``.
        value: Likewise.

    Returns:
        ``(b, s, n, d)``.
    """
    heads, length, size = query.shape[1], query.shape[2], value.shape[3]
    rows = []
    for row, pieces in enumerate(spans):
        parts, at = [], 0
        for start, end in [*pieces, (length, length)]:
            if start > at:
                parts.append(value.new_zeros(1, start - at, heads, size))
            if end > start:
                cut = (x[row : row + 1, :, start:end] for x in (query, key, value))
                parts.append(attend(*cut))
            at = end
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)
