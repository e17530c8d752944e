"""A learner's attention without a mask, in pieces whose queries see all of some keys.

Among the keys of a learner's own kind, the queries of that kind are causal: the j-th sees the first
j. Queries of a run of the other kind all see the same keys, those before the run. So a row is one
causal attention and one plain one for each such run, which is half the work of a mask or less: the
text before an image costs its visual learner nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from mmgraft.grafts.base import PADDING, Pass
from mmgraft.grafts.wings.spans import joined

_SHORTEST = 16
"""Positions of a piece, on average; with shorter ones a mask is faster."""


@dataclass
class Segment:
    """One row of a sequence, for one kind.

    Attributes:
        first: Its first key among the packed ones.
        count: Its keys.
        own: Runs of the kind's own queries, from column to column.
        others: Runs of other queries, and how many keys they see.
    """

    first: int
    count: int = 0
    own: list[tuple[int, int]] = field(default_factory=list)
    others: list[tuple[int, int, int]] = field(default_factory=list)


Plan = list[list[Segment]]
"""Pieces of every row of a batch."""


def plan_pieces(state: Pass, kind: int) -> Plan | None:
    """Return the pieces of a pass that begins its rows, or None where they are too many."""
    batch, length = state.kinds.shape
    segments = [[0] * length] * batch if state.segments is None else state.segments.tolist()
    plan = [_row(*row, kind) for row in zip(state.kinds.tolist(), segments, strict=True)]
    pieces = sum(len(part.own) + len(part.others) for row in plan for part in row)
    return plan if pieces * _SHORTEST <= batch * length else None


def _row(kinds: list[int], segments: list[int], kind: int) -> list[Segment]:
    found: list[Segment] = []
    keys = at = 0
    last = None
    for (segment, run), positions in groupby(zip(segments, kinds, strict=True)):
        start, at = at, at + len(list(positions))
        if segment != last:
            found.append(Segment(keys))
            last = segment
        here = found[-1]
        if run == kind:
            here.own.append((start, at))
            here.count += at - start
            keys += at - start
        elif run != PADDING and here.count:
            here.others.append((start, at, here.count))
    return [segment for segment in found if segment.count]


def attend_pieces(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lower: Callable[[Tensor], Tensor],
    width: int,
) -> Tensor:
    """Attention by a plan, each piece made small before the pieces are joined.

    Args:
        plan: The pieces.
        query: ``(b, heads, s, d)``.
        key: ``(b, heads, K, d)``, packed by kind.
        value: Likewise.
        lower: A piece's mixed values ``(1, heads, c, d)`` to ``(1, c, width)``.
        width: Of what is joined.

    Returns:
        ``(b, s, width)``, exactly 0 for a query that sees no key.
    """
    key, value = key.to(query.dtype), value.to(query.dtype)
    rows = []
    for number, segments in enumerate(plan):
        q, k, v = (x[number : number + 1] for x in (query, key, value))
        parts: dict[int, Tensor] = {}
        for segment in segments:
            keys = slice(segment.first, segment.first + segment.count)
            # (1, c, heads, d) in memory, as the kernel's output then is: no copy of that is made
            own = torch.cat([q.transpose(1, 2)[:, start:end] for start, end in segment.own], dim=1)
            own = own.transpose(1, 2)
            mixed = F.scaled_dot_product_attention(
                own, k[:, :, keys], v[:, :, keys], is_causal=True
            )
            lengths = [end - start for start, end in segment.own]
            lowered = lower(mixed).split(lengths, dim=1)
            parts.update(zip((start for start, _ in segment.own), lowered, strict=True))
            for start, end, count in segment.others:
                keys = slice(segment.first, segment.first + count)
                mixed = F.scaled_dot_product_attention(
                    q[:, :, start:end], k[:, :, keys], v[:, :, keys]
                )
                parts[start] = lower(mixed)
        blank = next(iter(parts.values()), query.new_empty(1, 0, width))
        rows.append(joined(parts, query.shape[2], blank))
    return torch.cat(rows)
