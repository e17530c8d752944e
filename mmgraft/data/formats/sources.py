"""Rows from files: LLaVA's json and OpenAI-style messages, in JSON, parquet, tars and data sets."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmgraft.data.bad_rows import BadRow, absolute, fault_of
from mmgraft.data.formats.indexed import FactsBuilder, FileRows, Joined, RowIndex
from mmgraft.data.formats.reader import Format, RowReader, id_of
from mmgraft.data.formats.record_files import Found, RecordFile, json_file
from mmgraft.data.formats.shards import Source
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError

__all__ = ["OnBad", "RowReader", "Source", "index_rows", "read_rows", "records", "row_at"]

OnBad = Callable[[BadRow], None]


@dataclass(frozen=True)
class Checks:
    """What is asked of a row before it counts.

    Attributes:
        images: refuse a row whose image file is missing now, not when it is used.
        on_bad: told of each row that cannot be used, which is left out; None raises instead.
        leave_out: keys (see `BadRow.key`) of rows that are not looked at.
        accept: raises UsageError for a row that shall count as bad.
        one: refuse a source that has not one row to use.
    """

    images: bool = True
    on_bad: OnBad | None = None
    leave_out: Collection[tuple[str, str]] = ()
    accept: Callable[[Row], object] = lambda row: None
    one: bool = True


def read_rows(
    path: str | Path,
    images: str | Path | None = None,
    format: Format = "auto",
    limit: int | None = None,
    check_images: bool = True,
    on_bad: OnBad | None = None,
) -> list[Row]:
    """Read all rows of a file into memory; `index_rows` leaves them where they are.

    A file of JSON is a list or one object a line. A row is one of

    - LLaVA's: `{"id", "image": path or list, "conversations": [{"from": "human", "value": ...}]}`,
      where every `<image>` in a value is one of the images, in order;
    - messages: `{"messages": [{"role", "content"}]}`, content a text or a list of
      `{"type": "text", "text"}`, `{"type": "image", "image": path}` and
      `{"type": "image_url", "image_url": {"url": path or data URI}}`; `{"type": "image"}` alone
      takes the next of a list `"images"` beside the messages.

    Args:
        path: the file; for what else it may be, see `Source`.
        images: the folder that image paths start from, and must not leave; by default the file's.
        format: "auto" tells the two kinds of rows apart by their keys.
        limit: read this many rows, from the first.
        check_images: see `Checks`.
        on_bad: see `Checks`.

    Raises:
        UsageError: naming file, row and what is wrong.
    """
    source = Source(str(path), None if images is None else str(images), format, limit)
    checks = Checks(check_images, on_bad)
    every = (row for opened in _opened(source) for _, row in _good(*opened, source, checks))
    rows = list(islice(every, limit))
    if not rows:
        _refuse_none(source, checks)
    return rows


def index_rows(source: Source, checks: Checks | None = None) -> RowIndex:
    """Read and check all rows once, and keep where they lie.

    Args:
        source: the files.
        checks: what is asked of a row.

    Raises:
        UsageError: naming file, row and what is wrong.
    """
    checks = checks or Checks()
    parts: list[FileRows] = []
    left = source.limit
    for file, folder in _opened(source):
        positions, numbers, facts = array("q"), array("I"), FactsBuilder()
        for found, row in islice(_good(file, folder, source, checks), left):
            positions.append(found.position)
            numbers.append(found.number)
            facts.add(row)
        rows = FileRows(
            file,
            folder,
            source.format,
            np.array(positions, dtype=np.int64),
            np.array(numbers, dtype=np.uint32),
            facts.facts(),
        )
        parts.append(rows)
        left = None if left is None else left - len(rows)
        if left == 0:
            break
    index = parts[0] if len(parts) == 1 else Joined(parts)
    if not len(index):
        _refuse_none(source, checks)
    return index


def row_at(sources: Sequence[Source], number: int) -> Row:
    """One row, counted from 1 over all files of all sources; the others are not looked at.

    Of a source with a limit, its first rows are counted.

    Raises:
        UsageError: as `read_rows`, for this row; or there are fewer.
    """
    count = 0
    for source in sources:
        every = ((file, folder, found) for file, folder in _opened(source) for found in file.scan())
        for file, folder, found in islice(every, source.limit):
            count += 1
            if count == number:
                return _row(file, folder, source, found, False)
    names = ", ".join(source.path for source in sources)
    have = "has" if len(sources) == 1 else "have"
    raise UsageError(
        f"{names} {have} {count} rows, so none is number {number}; ask for one up to that"
    )


def records(path: Path, on_bad: OnBad | None = None) -> Iterator[tuple[str, Any]]:
    """Every record of a file and its place, from a JSON list or from lines of JSON.

    Raises:
        UsageError: for what is not JSON; of lines `on_bad` is told instead, where it is given.
    """
    file = json_file(str(path))
    for found in file.scan():
        place = f"{file.unit} {found.number}"
        if isinstance(found.record, UsageError):
            if on_bad is None:
                raise found.record
            on_bad(BadRow(absolute(file.file), place, None, "row", str(found.record)))
            continue
        yield place, found.record.data


def _opened(source: Source) -> Iterator[tuple[RecordFile, str | None]]:
    """Every file, and the folder that its image paths start from."""
    for file in source.files():
        folder = source.folder(file)
        yield source.open(file), folder


def _good(
    file: RecordFile, folder: str | None, source: Source, checks: Checks
) -> Iterator[tuple[Found, Row]]:
    """The rows that can be used."""
    whole = absolute(file.file)
    for found in file.scan():
        place = f"{file.unit} {found.number}"
        if checks.leave_out and (whole, place) in checks.leave_out:
            continue
        try:
            row = _row(file, folder, source, found, checks.images)
            checks.accept(row)
        except UsageError as error:
            if checks.on_bad is None:
                raise
            index = None
            if not isinstance(found.record, UsageError) and isinstance(found.record.data, dict):
                index = id_of(found.record.data)
            checks.on_bad(BadRow(whole, place, index, fault_of(error), str(error)))
            continue
        yield found, row


def _row(
    file: RecordFile, folder: str | None, source: Source, found: Found, check_images: bool
) -> Row:
    if isinstance(found.record, UsageError):
        raise found.record
    reader = RowReader(file.file, folder, source.format, check_images, found.record.pictures)
    return reader.row(f"{file.unit} {found.number}", found.record.data)


def _refuse_none(source: Source, checks: Checks) -> None:
    """Raise the error of a source without a row to use: the first row's own, where it has rows."""
    if source.limit == 0:
        return
    for file, folder in _opened(source):
        for found in file.scan():
            if not checks.one:
                return  # all are bad, and `on_bad` has them
            try:
                checks.accept(_row(file, folder, source, found, checks.images))
            except UsageError as error:
                raise UsageError(
                    f"{source.path}: not one of its rows can be used; the first: {error}"
                ) from None
            raise UsageError(f"{source.path}: all of its rows are left out; begin anew")
    raise UsageError(f"{source.path} has no rows; give a file with at least one")
