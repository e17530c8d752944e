"""Rows of unequal length in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]


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
