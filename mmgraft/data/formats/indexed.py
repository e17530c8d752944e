"""Rows that stay on disk: what is kept of each is where it lies and a few numbers.

A million rows cost some 20 MB. Each is read and checked once when its file is opened, and read
again at each access.
"""

from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from mmgraft.data.chat.turns import Message, answering, images_of_all, is_image, strings_in
from mmgraft.data.formats.layouts import Reading
from mmgraft.data.formats.reader import RowReader
from mmgraft.data.formats.record_files import RecordFile
from mmgraft.data.rows import Row, absolute, key_of


class Facts(NamedTuple):
    """Facts of rows that are known without reading them.

    Attributes:
        characters: Number of characters of all texts, (n,) uint32.
        images: Number of image parts, (n,) uint16.
        answers: True where the assistant says anything, (n,) bool.
    """

    characters: NDArray[np.uint32]
    images: NDArray[np.uint16]
    answers: NDArray[np.bool_]

    @property
    def with_image(self) -> NDArray[np.bool_]:
        """Return whether a row has an image, (n,)."""
        return self.images > 0

    def at(self, indices: NDArray[Any]) -> "Facts":
        """Return those of some rows."""
        return Facts._make(array[indices] for array in self)


class FactsBuilder:
    """Facts of rows, one row after another."""

    def __init__(self) -> None:
        self.characters, self.images, self.answers = array("I"), array("H"), array("B")

    def add(self, row: Row) -> None:
        """Note a row."""
        self.characters.append(min(_characters(row.messages), 2**32 - 1))
        self.images.append(min(sum(1 for _ in images_of_all(row.messages)), 2**16 - 1))
        self.answers.append(bool(answering(row.messages)))

    def facts(self) -> Facts:
        """Return all that was noted."""
        return Facts(
            np.array(self.characters, dtype=np.uint32),
            np.array(self.images, dtype=np.uint16),
            np.array(self.answers, dtype=np.bool_),
        )


def _characters(messages: Sequence[Message]) -> int:
    count = 0
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list | tuple) else [{"text": content}]
        count += sum(len(part.get("text") or "") for part in parts if not is_image(part))
        if calls := message.get("tool_calls"):
            count += sum(map(len, strings_in(calls)))
    return count


class RowIndex(Sequence[Row]):
    """Rows by number, read at each access. A slice is an index too."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """Numbers of all rows."""

    @abstractmethod
    def key(self, at: int) -> tuple[str, str]:
        """File and place of a row, as ``BadRow.key``."""

    @abstractmethod
    def row(self, at: int) -> Row:
        """Read a row.

        Raises:
            UsageError: Its file has changed.
        """

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | Sequence[Row]:
        """Return a row, or an index of some rows."""
        if isinstance(at, slice):
            return Selected(self, np.arange(len(self))[at])
        where = int(at) + len(self) if at < 0 else int(at)
        if not 0 <= where < len(self):
            raise IndexError(f"row {at} of {len(self)}")
        return self.row(where)

    def __iter__(self) -> Iterator[Row]:
        return (self.row(at) for at in range(len(self)))


class FileRows(RowIndex):
    """The good rows of one file.

    Args:
        source: Reads the records.
        folder: That image paths start from.
        reading: Of the rows.
        positions: Of the records, (n,) int64.
        numbers: Of the records, (n,) uint32.
        facts: Of the rows.
    """

    def __init__(
        self,
        source: RecordFile,
        folder: str | None,
        reading: Reading,
        positions: NDArray[np.int64],
        numbers: NDArray[np.uint32],
        facts: Facts,
    ) -> None:
        self.source = source
        self.folder = folder
        self.reading = reading
        self.positions, self.numbers = positions, numbers
        self._facts = facts
        self._file = absolute(source.file)

    @property
    def facts(self) -> Facts:
        """See ``RowIndex``."""
        return self._facts

    def __len__(self) -> int:
        return len(self.positions)

    def key(self, at: int) -> tuple[str, str]:
        """See ``RowIndex``."""
        return self._file, f"{self.source.unit} {self.numbers[at]}"

    def row(self, at: int) -> Row:
        """See ``RowIndex``."""
        number = int(self.numbers[at])
        record = self.source.read(int(self.positions[at]), number)
        reader = RowReader(self.source.file, self.folder, self.reading, False, record.images)
        return reader.row(f"{self.source.unit} {number}", record.data)


class Joined(RowIndex):
    """Several sequences of rows, one behind another."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        """Take the parts; none is copied."""
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64).tolist()

    @property
    def facts(self) -> Facts:
        """See ``RowIndex``."""
        found = [facts_of(part) for part in self.parts] or [FactsBuilder().facts()]
        return Facts._make(map(np.concatenate, zip(*found, strict=True)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def key(self, at: int) -> tuple[str, str]:
        """See ``RowIndex``."""
        part, index = self._find(at)
        return key_at(self.parts[part], index)

    def row(self, at: int) -> Row:
        """See ``RowIndex``."""
        part, index = self._find(at)
        return self.parts[part][index]

    def _find(self, at: int) -> tuple[int, int]:
        part = bisect_right(self.ends, at)
        return part, at - (self.ends[part - 1] if part else 0)


class Selected(RowIndex):
    """Some rows of others, in any order; a row may stand there more than once.

    Args:
        rows: To choose from.
        indices: Which, (n,).
    """

    def __init__(self, rows: Sequence[Row], indices: NDArray[Any]) -> None:
        if isinstance(rows, Selected):
            rows, indices = rows.rows, rows.indices[indices]
        small = len(rows) <= 2**32
        self.rows = rows
        self.indices = indices.astype(np.uint32 if small else np.int64, copy=False)

    @property
    def facts(self) -> Facts:
        """See ``RowIndex``."""
        return facts_of(self.rows).at(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, at: int) -> tuple[str, str]:
        """See ``RowIndex``."""
        return key_at(self.rows, int(self.indices[at]))

    def row(self, at: int) -> Row:
        """See ``RowIndex``."""
        return self.rows[int(self.indices[at])]


def facts_of(rows: Sequence[Row]) -> Facts:
    """Return facts of any rows; those of an index are at hand, others are looked at."""
    if isinstance(rows, RowIndex):
        return rows.facts
    builder = FactsBuilder()
    for row in rows:
        builder.add(row)
    return builder.facts()


def key_at(rows: Sequence[Row], at: int) -> tuple[str, str]:
    """Return file and place of a row, without reading it where it lies in an index."""
    return rows.key(at) if isinstance(rows, RowIndex) else key_of(rows[at])


def select(rows: Sequence[Row], chosen: NDArray[Any]) -> Sequence[Row]:
    """Return the rows at some indices (n,), or where a mask (all rows,) is true."""
    indices = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen
    return (
        rows if len(indices) == len(rows) and chosen.dtype == np.bool_ else Selected(rows, indices)
    )
