"""The sizes of a stage's rows that decide its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmgraft.data.batches.dataset import cut, longest_first
from mmgraft.data.chat.labels import supervise_row
from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.formats.indexed import facts_of, select
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.vision.plan import Size

TOKENISED = 64
"""Rows of a stage that are tokenised: those with the most text and image positions."""


@dataclass(frozen=True)
class RowSizes:
    """The largest row of a stage.

    Attributes:
        length: Positions, images counted.
        images: Images in the row that has the most.
        supervised: Supervised tokens in it.
        uneven: Rows differ in length.
        source: Where the numbers come from, in words.
        sizes: Of the images of that row, where their positions depend on them.
    """

    length: int
    images: int
    supervised: int
    uneven: bool
    source: str
    sizes: tuple[Size, ...] = ()


def measured(
    rows: Sequence[Row],
    processor: GraftProcessor,
    max_length: int | None,
    text_rows: str | None,
    packing: bool = False,
    skip_bad: bool = False,
) -> RowSizes:
    """Measure a stage's rows by tokenising the longest ones; with packing, its sequences.

    Args:
        rows: Of the stage.
        processor: For ids.
        max_length: Where rows are cut.
        text_rows: ``skip`` leaves rows without an image out.
        packing: Several rows stand in one sequence.
        skip_bad: Leave out rows that cannot be used.

    Raises:
        UsageError: A row that cannot be used; with ``skip_bad``, where none of the longest can.
    """
    kept = select(rows, facts_of(rows).with_image) if text_rows == "skip" else rows
    longest = [kept[int(at)] for at in longest_first(kept, processor)[:TOKENISED]]
    encoded = _usable(longest, processor, max_length, skip_bad)
    lengths = [len(one) for one in encoded]
    images = [len(one.images) for one in encoded]
    supervised = [sum(label != -100 for label in one.labels) for one in encoded]
    most = max(encoded, key=lambda one: sum(one.kinds))  # the row with the most image positions
    if packing and max_length is not None:
        # A sequence full of the rows that hold the most images and answers for their length.
        shown, labels = (
            max(max_length * n // length for n, length in zip(counts, lengths, strict=True))
            for counts in (images, supervised)
        )
        sizes, source = most.sizes * (max_length // len(most)), f"packed, from {len(kept)} rows"
        return RowSizes(max_length, shown, labels, True, source, sizes)
    uneven = len(kept) > len(longest) or len(set(lengths)) > 1
    source = f"longest of {len(kept)} rows"
    shown = len(most.sizes) or max(images)
    return RowSizes(max(lengths), shown, max(supervised), uneven, source, most.sizes)


def _usable(
    rows: Sequence[Row], processor: GraftProcessor, max_length: int | None, skip_bad: bool
) -> list[Encoded]:
    """Encode rows as training does, without those that cannot be used where it skips them."""
    found: list[Encoded] = []
    for at, row in enumerate(rows):
        try:
            encoded = supervise_row(processor, row)
            if max_length is not None and len(encoded) > max_length:
                encoded = cut(encoded, max_length, row.where)
            found.append(encoded)
        except UsageError:
            if not skip_bad or (not found and at + 1 == len(rows)):
                raise
    return found


def assumed(length: int, each: int | None, source: str, packing: bool = False) -> RowSizes:
    """Assume rows of one length with one image, all the rest of it supervised.

    A packed sequence is one of many rows: as many images as it has room for, each with an answer.

    Raises:
        UsageError: An image does not fit into the row, or its size decides how much it takes.
    """
    if each is None:
        raise UsageError(
            "with this tower the size of an image decides how many positions it takes; give --data "
            "FILE"
        )
    if length <= each + 1:
        raise UsageError(
            f"a row of {length} positions has no room for an image, which takes {each} with "
            f"this tower, and an answer; give --length {each + 64} or more"
        )
    images = length // (each + 2) if packing else 1
    return RowSizes(length, max(1, images), length - each - 1, True, source)
