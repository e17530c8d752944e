"""Sequence packing: several rows in one sequence, filled as far as ``max_length`` allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from mmgraft.data.batches.collate import Collator
from mmgraft.data.batches.dataset import Example, RowDataset
from mmgraft.data.batches.sequences import IGNORED, learned_within


@dataclass(frozen=True)
class Pack:
    """The rows of one sequence, in order."""

    examples: Sequence[Example]


class Packs(Dataset[Pack]):
    """Rows taken several at a time: an index is the tuple of the rows that go together."""

    def __init__(self, rows: RowDataset, count: int) -> None:
        """Take rows; ``count`` is how many packs an epoch has."""
        self.rows = rows
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Sequence[int]) -> Pack:
        """Return rows of one sequence; see ``RowDataset.together``."""
        return Pack(self.rows.together(index))


class PackCollator:
    """A collator's batch with the rows of a pack one behind another.

    Beside what the collator gives there is ``segments`` (b, s): the number of the row in its
    sequence, from 1, and 0 at padding. No label asks a row to predict the next one's beginning.
    Examples that are no packs (those of an evaluation) are collated as ever.
    """

    def __init__(self, collator: Collator) -> None:
        """Take the collator that makes the rows' tensors and images."""
        self.collator = collator

    def __call__(self, items: Sequence[Pack | Example]) -> dict[str, Any]:
        """One batch of a pack a sequence."""
        batch = self.collator(examples_of(items))
        packs = [item.examples for item in items if isinstance(item, Pack)]
        if not packs:
            return batch
        lengths = [[len(example) for example in pack] for pack in packs]
        fills = {
            "input_ids": self.collator.processor.pad_id,
            "attention_mask": 0,
            "mm_token_type_ids": 0,
            "labels": IGNORED,
        }
        for name, fill in fills.items():
            batch[name] = _joined(batch[name], lengths, fill)
        numbers = [
            torch.repeat_interleave(torch.arange(1, len(one) + 1), torch.tensor(one))
            for one in lengths
        ]
        batch["segments"] = pad_sequence(numbers, batch_first=True)
        if "image_rows" in batch:
            owner = torch.repeat_interleave(torch.tensor([len(pack) for pack in packs]))
            batch["image_rows"] = owner[batch["image_rows"]]
        batch["labels"] = learned_within(batch["labels"], batch["segments"])
        if "workflow" in batch:
            batch["workflow"] = batch["workflow"][: len(packs)]  # one and the same for all
        return batch


def examples_of(items: Sequence[Pack | Example]) -> list[Example]:
    """Return the rows of a batch, packed or not, in order."""
    found: list[Example] = []
    for item in items:
        found.extend(item.examples if isinstance(item, Pack) else [item])
    return found


def _joined(rows: Tensor, lengths: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Turn padded rows ``(rows, s)`` into sequences ``(b, s')``, each of the rows of one pack."""
    each = iter(rows)
    sequences = [torch.cat([next(each)[:length] for length in pack]) for pack in lengths]
    return pad_sequence(sequences, batch_first=True, padding_value=fill)


def fill(sizes: Sequence[int], capacity: int) -> list[int]:
    """Put sizes into as few bins as best fit finds.

    Args:
        sizes: Each at least 1 and at most ``capacity``, best given from the largest down.
        capacity: Of a bin.

    Returns:
        The number of the bin of each size. How many bins there are depends on the sizes alone.
    """
    bins_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left
    there = 0  # bit r: a bin with room r
    found: list[int] = []
    count = 0
    for size in sizes:
        fitting = there >> size
        if fitting:  # the fullest bin that takes it
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = bins_with[room].pop()
            if not bins_with[room]:
                there &= ~(1 << room)
        else:
            room, chosen, count = capacity, count, count + 1
        left = room - size
        bins_with[left].append(chosen)
        if left:
            there |= 1 << left
        found.append(chosen)
    return found
