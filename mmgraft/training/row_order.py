"""Group the rows of a stage: pack them into sequences, or sort them by length or kind.

Every order depends on the seed, the epoch and the rows alone, so that ranks agree on it and a
resumed run finds it. A batch is a run of neighbours in that order, a step on several ranks a run of
their batches.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmgraft.atomic import atomic_bytes
from mmgraft.data.batches.collate import Packs, fill
from mmgraft.data.batches.dataset import RowDataset
from mmgraft.data.batches.sampler import EpochSampler, EvenSampler
from mmgraft.data.formats.indexed import facts_of
from mmgraft.data.rows import BadRow
from mmgraft.errors import UsageError
from mmgraft.progress import counted
from mmgraft.recipes.recipe import Stage
from mmgraft.training.devices import is_main_rank

#: In the folder of a stage's checkpoints: positions of its rows, 0 for one that cannot be used.
LENGTHS = "lengths.npy"
_SIZES = 256  # rows whose lengths differ less than a sequence by this are taken as equal
_WINDOW = 64  # batches whose rows are sorted by length together
_MEASURED = 256  # rows measured in one go


@dataclass
class Arranged:
    """The rows of a stage as the Trainer takes them.

    Attributes:
        dataset: Rows, or packs of them.
        sampler: Their order.
        bad: Rows that were measured and cannot be used.
        says: What was done, in words; None where there is nothing to say.
    """

    dataset: Dataset[Any]
    sampler: "Order"
    bad: list[BadRow] = field(default_factory=list)
    says: str | None = None


def arrange(
    rows: RowDataset,
    stage: Stage,
    folder: Path,
    ranks: int = 1,
    workers: int = 0,
    kept: bool = False,
) -> Arranged:
    """Order the rows of a stage as its ``packing`` and ``group_by`` say.

    Args:
        rows: All of them.
        stage: Of a resolved recipe.
        folder: Of the stage's checkpoints; lengths are kept there for a later session.
        ranks: Processes that share a step.
        workers: Processes that measure rows.
        kept: Take the lengths of an earlier session, so that the order is the same.

    Raises:
        UsageError: A row that cannot be used, or other rows than in the session before.
    """
    seed, together = stage.seed or 0, stage.batch_size * ranks
    if stage.group_by == "modality":
        kinds = torch.from_numpy(facts_of(rows.rows).with_image)
        return Arranged(rows, GroupSampler(kinds.long(), together, seed, sort=False))
    if not stage.packing and stage.group_by is None:
        return Arranged(rows, EpochSampler(len(rows), seed))
    lengths, bad = _lengths(rows, folder, workers, kept)
    if stage.group_by == "length":
        return Arranged(rows, GroupSampler(lengths, together, seed), bad)
    assert stage.max_length is not None
    apart = None
    if stage.text_rows == "base":  # rows of a sequence run one workflow
        apart = torch.from_numpy(facts_of(rows.rows).with_image)
    sampler = PackSampler(lengths, stage.max_length, seed, apart)
    share = int(lengths.sum()) / (len(sampler) * stage.max_length)
    says = (
        f"stage {stage.name!r}: {int((lengths > 0).sum())} rows in {len(sampler)} sequences of up "
        f"to {stage.max_length} positions, {share:.0%} filled"
    )
    return Arranged(Packs(rows, len(sampler)), sampler, bad, says)


def check_packed_length(stage: Stage, positions: int | None) -> None:
    """Refuse packed sequences that are longer than a base's table of positions.

    Args:
        stage: Of a recipe.
        positions: Of the table; None where the base has none.

    Raises:
        UsageError: They are.
    """
    if not stage.packing or positions is None or (stage.max_length or 0) <= positions:
        return
    raise UsageError(
        f"stage {stage.name!r}: packing fills sequences of max_length: {stage.max_length}, and the "
        f"base has a table of {positions} positions; write max_length: {positions}, and a larger "
        "batch_size in its place"
    )


class GroupSampler(EpochSampler):
    """Every row once; the rows of a batch are alike in length, or all with or without an image.

    Args:
        keys: Of the rows, ``(n,)``: their lengths or their kinds.
        together: Rows of a step's batches on all ranks.
        seed: Of the order.
        sort: Sort rows by key within windows of batches; else keep the keys apart.
    """

    def __init__(self, keys: Tensor, together: int, seed: int = 0, sort: bool = True) -> None:
        super().__init__(len(keys), seed)
        self.keys = keys
        self.together = together
        self.sort = sort

    def __iter__(self) -> Iterator[int]:
        generator = self.generator()
        rows = torch.randperm(len(self.keys), generator=generator)
        whole, rest = self._sorted(rows) if self.sort else self._apart(rows)
        batches = whole.view(-1, self.together)
        batches = batches[torch.randperm(len(batches), generator=generator)]
        for batch in (*batches, rest):  # what fills no batch comes last
            yield from batch.tolist()

    def _sorted(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        end = len(rows) - len(rows) % self.together
        windows = rows[:end].split(self.together * _WINDOW)
        near = [window[self.keys[window].argsort(stable=True)] for window in windows]
        return torch.cat([*near, rows[:0]]), rows[end:]

    def _apart(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        whole, rest = [rows[:0]], [rows[:0]]
        for key in self.keys.unique():
            mine = rows[self.keys[rows] == key]
            end = len(mine) - len(mine) % self.together
            whole.append(mine[:end])
            rest.append(mine[end:])
        return torch.cat(whole), torch.cat(rest)


class PackSampler(EpochSampler):
    """Every usable row once, in packs that fit into a sequence; yields tuples of rows.

    Which sizes go together is the same in every epoch, which rows of a size, and in which order the
    packs come, is random: so every epoch has the same number of packs.

    Args:
        lengths: Of the rows, ``(n,)``; a row of length 0 is left out.
        capacity: Positions of a sequence, at least the longest row's.
        seed: Of the order.
        apart: ``(n,)``, rows of a pack have the same; None allows any.

    Raises:
        UsageError: No row can be used.
    """

    def __init__(
        self, lengths: Tensor, capacity: int, seed: int = 0, apart: Tensor | None = None
    ) -> None:
        usable = lengths.nonzero().flatten()
        if not len(usable):
            raise UsageError("not one row can be used; look at all of them: mmgraft data check")
        unit = max(1, capacity // _SIZES)
        room = capacity // unit
        sizes = (-(lengths[usable] // -unit)).clamp(max=room)  # a longest row takes all of it
        kinds = torch.zeros_like(sizes) if apart is None else apart[usable].long()
        self.keys = kinds * (room + 1) + room - sizes  # the largest first
        bins: list[Tensor] = []
        count = 0
        for kind in kinds.unique():
            falling = sizes[kinds == kind].sort(descending=True).values
            bins.append(torch.tensor(fill(falling.tolist(), room)) + count)
            count = int(bins[-1].max()) + 1
        super().__init__(count, seed)
        self.usable = usable
        self.bins = torch.cat(bins)  # of the rows in order of their keys

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        generator = self.generator()
        order = torch.randperm(len(self.usable), generator=generator)
        order = order[self.keys[order].argsort(stable=True)]
        by_bin = self.usable[order[self.bins.argsort(stable=True)]]
        ends = self.bins.bincount(minlength=len(self)).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        for pack in torch.randperm(len(self), generator=generator):
            yield tuple(by_bin[starts[pack] : ends[pack]].tolist())


def _lengths(
    rows: RowDataset, folder: Path, workers: int, kept: bool
) -> tuple[Tensor, list[BadRow]]:
    """Measure every row's positions ``(n,)``, 0 where it cannot be used, and list those rows."""
    file = folder / LENGTHS
    if kept and file.is_file():
        found = torch.from_numpy(np.load(file)).long()
        if len(found) != len(rows):
            raise UsageError(
                f"{file} was written for {len(found)} rows, and now there are {len(rows)}: give "
                "the rows that the training was begun with, or begin anew with --restart"
            )
        return found, []
    measure: Any = partial(_measure, rows)
    every: Any = range(len(rows))
    loader = DataLoader(every, batch_size=_MEASURED, num_workers=workers, collate_fn=measure)
    lengths, bad = np.zeros(len(rows), dtype=np.int32), []
    every = counted("tokenising rows for packing, in batches", loader)
    for at, length in enumerate(one for several in every for one in several):
        if isinstance(length, BadRow):
            bad.append(length)
        else:
            lengths[at] = length
    if is_main_rank():
        folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.save(content, lengths)
        atomic_bytes(file, content.getvalue())
    return torch.from_numpy(lengths).long(), bad


def _measure(rows: RowDataset, indices: Sequence[int]) -> list[int | BadRow]:
    """Measure the length of each row, or say why it cannot be used."""
    return [rows.length(index) for index in indices]


#: Order of the rows of an epoch, whose number is set with ``set_epoch``.
Order = EpochSampler | EvenSampler
