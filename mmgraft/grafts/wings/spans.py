"""Pieces of a mask that are causal alone: kernels skip the future there.

A fused kernel with an explicit mask computes all ``s x s`` scores; as a causal one, half of them.
A padded batch, or several rows in one sequence, is causal inside each row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Spans = Sequence[Sequence[tuple[int, int]]]
"""Beginning and end of the causal pieces of each row of a batch, in order."""


def causal_spans(mask: Tensor, padding: Tensor) -> Spans | None:
    """Return the pieces that make up a mask, or None where it is not made of such.

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
    blank = value.new_empty(1, 0, query.shape[1], value.shape[3])
    rows = []
    for row, pieces in enumerate(spans):
        parts = {
            start: attend(*(x[row : row + 1, :, start:end] for x in (query, key, value)))
            for start, end in pieces
        }
        rows.append(joined(parts, query.shape[2], blank))
    return torch.cat(rows)


def joined(parts: Mapping[int, Tensor], length: int, blank: Tensor) -> Tensor:
    """Put parts ``(1, c, ...)`` at their first columns and 0 between, ``(1, length, ...)``.

    Args:
        parts: By the column that each begins at.
        length: Of the row.
        blank: A tensor of the parts' dtype, device and last dimensions, for the zeros.
    """
    row, at = [], 0
    for start in [*sorted(parts), length]:
        if start > at:
            row.append(blank.new_zeros(1, start - at, *blank.shape[2:]))
        if start < length:
            row.append(parts[start])
            at = start + parts[start].shape[1]
    return torch.cat(row, dim=1)
