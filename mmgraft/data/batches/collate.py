"""Examples as one batch for a grafted model, or several rows as one sequence of it.

Packing fills a sequence as far as ``max_length`` allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from mmgraft.data.batches.dataset import Example, RowDataset, TextRows
from mmgraft.data.batches.sequences import IGNORED, learned_within, pad
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.features import image_file
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.vision.feature_cache import Compute, FeatureCache, ImageFile


@dataclass
class Collator:
    """Puts examples together, padded on the right.

    A batch has ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` and ``labels``, each
    (b, s); for its images in order of appearance what ``GraftProcessor.images_of`` says of them and
    ``pixel_values``, or ``image_features`` (sum of their vectors, vision hidden) from a cache; and
    ``row_ids``, a list of b texts. With ``text_rows`` "graft" it also names the workflow of every
    row, so that rows without an image run the graft too.

    Attributes:
        processor: Pads and makes pixels.
        text_rows: See ``RowDataset``.
        features: Asked for image features instead of making pixels; the dataset then leaves its
            images unopened (``load_images=False``).
        compute: Features of files that the cache does not hold yet, such as ``TowerFeatures``
            gives; without it they are an error.
        workflow: The one that rows run with ``text_rows`` "graft".
        multiple: Round the length of a batch of uneven rows up to a multiple of this.
    """

    processor: GraftProcessor
    text_rows: TextRows = "skip"
    features: FeatureCache | None = None
    compute: Compute | None = None
    workflow: str = "mm"
    multiple: int = 1

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """One batch; see the class.

        Raises:
            UsageError: Where pixels are wanted and the processor has no preprocessing; where a
                feature cache is asked for an image that is no file, or that it does not hold.
        """
        rows = [example.encoded for example in examples]
        uneven = len({len(row.labels) for row in rows}) > 1  # even ones need no mask at all
        multiple = self.multiple if uneven else 1
        batch: dict[str, Any] = self.processor.collate(rows, "right", multiple)
        batch["labels"] = pad([row.labels for row in rows], -100, "right", multiple)
        images = [image for example in examples for image in example.images]
        if images and self.features is not None:
            paths = [image_file(image, one.where) for one in examples for image in one.images]
            found = self.features.get_many(paths, self.compute or _not_cached)
            batch["image_features"] = torch.cat(found)
        elif images:
            batch["pixel_values"] = self.processor.pixels(images)
        if self.text_rows == "graft":
            batch["workflow"] = [self.workflow] * len(rows)
        batch["row_ids"] = [example.row_id for example in examples]
        return batch


def _not_cached(paths: list[ImageFile]) -> list[Tensor]:
    raise UsageError(
        f"the feature cache does not hold {paths[0]}; compute the features of all images first"
    )


class Pack(Frozen):
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
