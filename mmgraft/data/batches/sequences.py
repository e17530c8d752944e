"""Several rows in one sequence: where each begins, and which positions are its own.

A packed batch says with `segments (b, s)` which row of its sequence every position belongs to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""A label that nothing is learned from."""


def begins(segments: Tensor) -> Tensor:
    """True at the first position of every row and of the padding, ``(b, s)``."""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)


def number(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by number and positions within them.

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
    """The labels ``(b, s)`` without those that the row before would have to predict."""
    return labels.masked_fill(begins(segments).to(labels.device), IGNORED)
