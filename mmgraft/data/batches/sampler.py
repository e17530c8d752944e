"""The order of rows: from the seed and the epoch alone, so that a resumed run finds it again.

The last batches of an epoch are as many and as large on every rank, though its rows are not.
accelerate would show the first rows of the epoch once more, and train on them. Here what fills a
batch has nothing to learn, so that several processes learn what one does with the same global
batch, to the last row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from mmgraft.data.batches.dataset import Example
from mmgraft.data.batches.packing import Pack


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


@dataclass(frozen=True)
class Filler:
    """In the place of an index: a row that is shown and not supervised."""

    index: Any


class EvenSampler(Sampler[Any]):
    """An order, filled up to a whole number of steps of all ranks.

    Args:
        order: Of an epoch; it has ``set_epoch``.
        together: Rows of one batch on every rank.
    """

    def __init__(self, order: Any, together: int) -> None:
        self.order = order
        self.together = together

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order) + -len(self.order) % self.together

    def __iter__(self) -> Iterator[Any]:
        first: Any = None
        for index in self.order:
            first = index if first is None else first
            yield index
        for _ in range(-len(self.order) % self.together):
            yield Filler(first)


class EvenDataset(Dataset[Any]):
    """Rows, or packs of them, that also gives fillers.

    Args:
        dataset: Of rows or packs.
        together: Where they are taken in order, by no sampler: rows of one batch on every rank.
    """

    def __init__(self, dataset: Any, together: int = 1) -> None:
        self.dataset = dataset
        self.together = together

    def __len__(self) -> int:
        return len(self.dataset) + -len(self.dataset) % self.together

    def __getitem__(self, index: Any) -> Any:
        """Return a row or pack; in a filler's place, and behind the last one, one without a
        label.
        """
        if isinstance(index, int) and index >= len(self.dataset):
            index = Filler(0)
        if not isinstance(index, Filler):
            return self.dataset[index]
        item = self.dataset[index.index]
        if isinstance(item, Pack):
            return Pack([_silent(example) for example in item.examples])
        return _silent(item)


def _silent(example: Example) -> Example:
    return replace(example, encoded=replace(example.encoded, spans=()), skipped=())
