"""The order of rows: from the seed and the epoch alone, so that a resumed run finds it again.

Several sources are one list of rows, the same for the same seed.

The last batches of an epoch are as many and as large on every rank, though its rows are not.
accelerate would show the first rows of the epoch once more, and train on them. Here what fills a
batch has nothing to learn, so that several processes learn what one does with the same global
batch, to the last row.
"""

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from mmgraft.data.batches.collate import Pack
from mmgraft.data.batches.dataset import Example
from mmgraft.data.formats.indexed import Joined, RowIndex, Selected
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen


class Part(Frozen):
    """Rows of one source and how often an epoch shows each: 2 is twice, 0.5 is every other one."""

    rows: Sequence[Row]
    weight: float = 1.0


def mix(parts: Sequence[Part], seed: int = 0, image_share: float | None = None) -> RowIndex:
    """Put sources together and shuffle them; no row is read.

    A source of n rows and weight w gives round(n w) rows: every row floor(w) times, and a
    random sample for the rest. What is sampled of a source depends on the seed and on its place in
    the list, not on the other sources.

    Args:
        parts: The sources.
        seed: Decides the samples and the order.
        image_share: How much of the rows have an image, above 0 and below 1. As many rows are
            shown as without it: rows of the one kind more often, of the other less often, as a
            weight would.

    Raises:
        UsageError: For a weight that is not above 0, a mixture without rows, or a share of rows of
            which there are none.
    """
    rows = Joined([part.rows for part in parts])
    chosen: list[NDArray[Any]] = []
    first = 0
    for index, part in enumerate(parts):
        if part.weight <= 0:
            raise UsageError(f"a data weight of {part.weight}; write one above 0, or leave it out")
        indices = np.arange(first, first + len(part.rows))
        wanted = round(len(part.rows) * part.weight)
        chosen.append(_sample(indices, wanted, random.Random(f"{seed} {index}")))
        first += len(part.rows)
    indices = np.concatenate(chosen) if chosen else np.arange(0)
    if image_share is not None and len(indices):
        indices = _with_share(indices, rows.facts.with_image[indices], image_share, seed)
    order = array("q", indices.astype(np.int64).tobytes())
    random.Random(f"{seed} order").shuffle(order)
    indices = np.array(order, dtype=np.int64)
    if not len(indices):
        raise UsageError("the data has no rows; set the files and weights to give some")
    return Selected(rows, indices)


def _sample(indices: NDArray[Any], wanted: int, draw: random.Random) -> NDArray[Any]:
    """Choose so many of some indices: each as often as it goes, and a sample for the rest."""
    whole, rest = divmod(wanted, len(indices)) if len(indices) else (0, 0)
    sample = draw.sample(range(len(indices)), rest)
    return np.concatenate([np.tile(indices, whole), indices[np.sort(np.array(sample, dtype=int))]])


def _with_share(
    indices: NDArray[Any], with_image: NDArray[np.bool_], share: float, seed: int
) -> NDArray[Any]:
    """Choose as many indices, of which a share has an image."""
    images = round(share * len(indices))
    found: list[NDArray[Any]] = []
    for name, kind, wanted in (
        ("with an image", with_image, images),
        ("without an image", ~with_image, len(indices) - images),
    ):
        if wanted and not kind.any():
            raise UsageError(
                f"image_share: {share:g} wants {wanted} of {len(indices)} rows {name}, and the "
                "data has none; add such rows, or leave image_share out"
            )
        found.append(_sample(indices[kind], wanted, random.Random(f"{seed} {name}")))
    return np.concatenate(found)


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


class Filler(Frozen):
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
