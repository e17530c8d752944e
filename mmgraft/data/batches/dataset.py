"""Rows as a torch dataset: tokenised, and their images opened, at access."""

import logging
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from mmgraft.data.chat.labels import supervise_row
from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.chat.turns import images_of_all
from mmgraft.data.formats.indexed import facts_of, key_at, select
from mmgraft.data.images import open_images, size_of
from mmgraft.data.rows import BadRow, OnBadRow, Row
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen

TextRows = Literal["skip", "graft", "base"]

_CUT, _SKIPPED = 1, 2
_CHARACTERS = 3  # a position, about
_log = logging.getLogger(__name__)


class Example(Frozen):
    """A row ready for a batch.

    Attributes:
        encoded: Ids, kinds, spans.
        images: Opened images, or what the row says of them where a feature cache has them.
        row_id: The row's.
        where: Names the row in errors.
        skipped: Rows that could not be used and in whose place this one stands, as far as they
            were not known before.
    """

    encoded: Encoded
    images: Sequence[Any]
    row_id: str
    where: str
    skipped: tuple[BadRow, ...] = ()

    def __len__(self) -> int:
        """Positions, an image's counted."""
        return len(self.encoded)


class RowDataset(Dataset[Example]):
    """Rows to train on.

    Rows too long are cut on the right, never inside an image: the cut moves to before it. What was
    cut and skipped is counted (``counts``), once a row, over all worker processes.

    Attributes:
        rows: The rows in use.
        dropped_text_rows: How many rows without an image were left out.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        processor: GraftProcessor,
        max_length: int | None = None,
        text_rows: TextRows = "skip",
        on_bad_row: OnBadRow = "error",
        load_images: bool = True,
        known_bad: Collection[tuple[str, str]] = (),
        positions: int | None = None,
    ):
        """Take rows; nothing is tokenised yet.

        Args:
            rows: In the order of their index.
            processor: For ids.
            max_length: Positions of a row, an image's counted; None cuts nothing.
            text_rows: "skip" leaves rows without an image out, as nothing of theirs can be trained
                beside a frozen base; "graft" and "base" keep them.
            on_bad_row: What a row does that cannot be used: "error" raises, "skip" puts the next
                good row in its place, so that batches keep their size, and which row stands where
                does not depend on what was met before.
            load_images: Open images at access; false where a feature cache has them.
            known_bad: Keys (see ``BadRow.key``) of rows that count as bad without being looked at;
                for "skip".
            positions: That the base has a table of; None where it has none.

        Raises:
            UsageError: No row is left.
        """
        kept = _with_images(rows) if text_rows == "skip" else rows
        if not kept:
            raise UsageError("no rows to train on; set data in the recipe or give --data")
        self.dropped_text_rows = len(rows) - len(kept)
        self.rows = kept
        self.processor = processor
        self.max_length = max_length
        self.positions = positions
        self.on_bad_row = on_bad_row
        self.load_images = load_images
        self._flags = torch.zeros(len(kept), dtype=torch.uint8).share_memory_()
        if known_bad:
            for at in range(len(kept)):
                self._flags[at] = _SKIPPED if key_at(kept, at) in known_bad else 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Tokenise a row and open its images.

        Raises:
            UsageError: For a row that cannot be used; with ``on_bad_row`` "skip", where all cannot.
        """
        skipped: list[BadRow] = []
        for step in range(len(self.rows)):
            example = self._usable((index + step) % len(self.rows), skipped)
            if example is not None:
                return replace(example, skipped=tuple(skipped))
        last = f"; the last one: {skipped[-1].reason}" if skipped else ""
        raise UsageError(
            f"not one of {len(self.rows)} rows can be used{last}\nlook at all of them with: "
            "mmgraft data check"
        )

    def together(self, indices: Sequence[int]) -> list[Example]:
        """Return rows that were chosen to go together, without those that cannot be used.

        Where none is left, the next good row stands for all.

        Raises:
            UsageError: As for one row.
        """
        skipped: list[BadRow] = []
        found = [self._usable(index, skipped) for index in indices]
        good = [example for example in found if example is not None] or [self[indices[0]]]
        return [replace(good[0], skipped=(*skipped, *good[0].skipped)), *good[1:]]

    def length(self, index: int) -> int | BadRow:
        """Positions of a row as it is trained on, or why it cannot be used; no image is opened.

        Raises:
            UsageError: For a row that cannot be used, where such rows are not skipped.
        """
        try:
            return len(self._encoded(self.rows[index])[0])
        except UsageError as error:
            if self.on_bad_row == "error":
                raise
            self._flags[index] |= _SKIPPED
            return BadRow.of(self.rows[index], error)

    def check(self, most: int = 1000) -> None:
        """Tokenise rows before any of them is needed; no image is opened.

        Of a set larger than ``most``, half of these are its longest rows, which a ``max_length``
        would leave nothing to learn of, and half stand evenly in the rest.

        Raises:
            UsageError: For the first row that cannot be used.
        """
        for at in self._sample(most):
            self._encoded(self.rows[at])

    def _sample(self, most: int) -> Iterator[int]:
        every = range(len(self.rows))
        if len(self.rows) <= most:
            yield from every
            return
        longest = longest_first(self.rows, self.processor)[: most // 2].tolist()
        yield from sorted({*longest, *every[:: -(-len(every) // (most // 2))]})

    @property
    def counts(self) -> dict[str, int]:
        """Rows met so far that were cut, and that were skipped as unusable."""
        return {
            "cut": int((self._flags & _CUT).ne(0).sum()),
            "skipped": int((self._flags & _SKIPPED).ne(0).sum()),
        }

    def _usable(self, index: int, skipped: list[BadRow]) -> Example | None:
        """Return a row; None for one to be skipped, which is noted in ``skipped``."""
        if self._flags[index] & _SKIPPED:
            return None
        try:
            return self._example(index)
        except UsageError as error:
            if self.on_bad_row == "error":
                raise
            self._flags[index] |= _SKIPPED
            skipped.append(BadRow.of(self.rows[index], error))
            return None

    def _example(self, index: int) -> Example:
        row = self.rows[index]
        encoded, shorter = self._encoded(row)
        if shorter:
            self._flags[index] |= _CUT
        images = open_images(encoded.images, row.where) if self.load_images else encoded.images
        return Example(encoded, images, row.id, row.where)

    def _encoded(self, row: Row) -> tuple[Encoded, bool]:
        """Return a row as it is trained on, and whether it had to be cut."""
        encoded = supervise_row(self.processor, row)
        return fitted(encoded, self.max_length, self.positions, row.where)


def _with_images(rows: Sequence[Row]) -> Sequence[Row]:
    """Leave out rows without an image."""
    kept = select(rows, facts_of(rows).with_image)
    if rows and not kept:
        raise UsageError(
            "no row has an image, and text_rows: skip leaves the others out; check the data, or "
            "set text_rows: graft"
        )
    if dropped := len(rows) - len(kept):
        _log.debug(
            "%d of %d rows have no image and are left out (text_rows: skip)", dropped, len(rows)
        )
    return kept


def longest_first(rows: Sequence[Row], processor: GraftProcessor) -> NDArray[np.int64]:
    """Return the indices of rows by about their positions; none is tokenised.

    Where the size of an image decides its positions, the head of every image's file is read.
    """
    facts, positions = facts_of(rows), processor.image_positions
    shown = facts.images.astype(np.int64) * (positions.fixed or 0)
    if positions.fixed is None:
        for at in np.flatnonzero(facts.images):
            row = rows[int(at)]
            try:
                sizes = [size_of(image, row.where) for image in images_of_all(row.messages)]
            except UsageError:  # said where the row is used
                continue
            shown[at] = sum(map(positions, sizes))
    return np.argsort(-(facts.characters.astype(np.int64) + _CHARACTERS * shown), kind="stable")


def fitted(
    encoded: Encoded, max_length: int | None, positions: int | None, where: str
) -> tuple[Encoded, bool]:
    """Return a row as it is trained on, and whether it had to be cut.

    Args:
        encoded: All of it.
        max_length: Where rows are cut; None cuts nothing.
        positions: That the base has a table of; None where it has none.
        where: Names the row in errors.

    Raises:
        UsageError: Where nothing to learn is left, or the base has no positions for the row.
    """
    shorter = max_length is not None and len(encoded) > max_length
    if max_length is not None and shorter:
        encoded = cut(encoded, max_length, where)
    if positions is not None and len(encoded) > positions:
        raise UsageError(
            f"{where}: {len(encoded)} positions, and the base has a table of {positions}; set "
            f"max_length: {positions} in the stage, which cuts longer rows, or leave the row out"
        )
    return encoded, shorter


def cut(encoded: Encoded, max_length: int, where: str) -> Encoded:
    """Return the first positions of a row, at most ``max_length``; an image is whole or left out.

    Raises:
        UsageError: Naming the row, where nothing to learn is left.
    """
    end = min(max_length, len(encoded))
    shown = sum(encoded.kinds[:end])
    ends = list(accumulate(encoded.lengths, initial=0))  # among the image positions
    whole = bisect_right(ends, shown) - 1
    if shown > ends[whole]:
        end = [at for at, kind in enumerate(encoded.kinds) if kind][ends[whole]]
    shorter = encoded.part(0, end)
    if all(label == -100 for label in shorter.labels):
        first = encoded.spans[0][0] if encoded.spans else len(encoded)
        raise UsageError(
            f"{where}: {len(encoded)} positions, and the first {max_length} hold nothing to learn "
            f"(its first answer begins at {first}); raise max_length, or leave the row out"
        )
    return shorter
