"""Rows in one tensor: padded to one length, or packed, several of them in a sequence.

A packed batch says with ``segments (b, s)`` which row of its sequence every position belongs to.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Side = Literal["left", "right"]

#: The label of tokens that are not supervised.
IGNORED = -100


def pad(rows: Sequence[Sequence[int]], value: int, side: Side, multiple: int = 1) -> Tensor:
    """Pad rows of numbers to the longest of them.

    Args:
        rows: B rows.
        value: Fills the gap.
        side: Where the gap is: "left" for batched generation, which needs the last position to be
            every row's newest token; "right" for training.
        multiple: Round the length up to a multiple of this.

    Returns:
        (b, s) int64.
    """
    longest = max((len(row) for row in rows), default=0)
    length = -(-longest // multiple) * multiple
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    for index, row in enumerate(rows):
        if row:
            where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            padded[index, where] = torch.tensor(row, dtype=torch.int64)
    return padded


def begins(segments: Tensor) -> Tensor:
    """Mark the first position of every row and of the padding, ``(b, s)``."""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)


def number(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows by number and positions within them.

    Args:
        segments: ``(b, s)``, 0 at padding; neighbours in a sequence have different numbers.

    Returns:
        Row numbers ``(b, s)`` that no two rows of a sequence share, 0 at padding, and the
        positions ``(b, s)``, which begin at 0 with every row.
    """
    first = begins(segments)
    columns = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    start = torch.where(first, columns, 0).cummax(dim=-1).values
    return first.long().cumsum(-1).masked_fill(segments == 0, 0), columns - start


def learned_within(labels: Tensor, segments: Tensor) -> Tensor:
    """Return the labels ``(b, s)`` without those that the row before would have to predict."""
    return labels.masked_fill(begins(segments).to(labels.device), IGNORED)
