"""The order of rows: drawn from the seed and the epoch alone, so that a resumed run finds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[Any]):
    """Every row once, in an order that the seed and the epoch number fix.

    Args:
        rows: How many there are.
        seed: Of the order.
    """

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(self.rows, generator=self.generator()).numpy()
        return map(int, order)  # a list of a million numbers takes 40 MB

    def generator(self) -> torch.Generator:
        """Make the source of the epoch's random numbers."""
        return torch.Generator().manual_seed((self.seed << 20) + self.epoch)
