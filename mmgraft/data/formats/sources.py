"""Rows from files: which files a name stands for, what reads each, and their rows in order."""

import glob
import logging
import os
import re
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from mmgraft.data.formats import layouts, tables, tar_files
from mmgraft.data.formats.indexed import FactsBuilder, FileRows, Joined, RowIndex
from mmgraft.data.formats.reader import RowReader, id_of
from mmgraft.data.formats.record_files import Found, Record, RecordFile, json_file
from mmgraft.data.rows import HUB, BadRow, Row, absolute, fault_of
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.progress import counted

_log = logging.getLogger(__name__)
OnBad = Callable[[BadRow], None]

#: Endings of the files in a folder of shards.
ENDINGS = (".json", ".jsonl", ".parquet", ".tar")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Source(Frozen):
    """Rows that belong together: a file, or the shards of one set.

    Attributes:
        path: A file, a folder of shards, a pattern (``shards/*.tar``, ``{000..127}.tar``), a folder
            that ``datasets`` saved, or ``hub:OWNER/NAME``.
        images: The folder that image paths start from; None: each file's own.
        reading: What the rows are; by default the keys of each say in which layout it is.
        limit: The first rows only.
        split: Of a set of ``datasets``.
        subset: Of a set of the Hub.
        revision: Of a set of the Hub.
    """

    path: str
    images: str | None = None
    reading: layouts.Reading = field(default_factory=layouts.Reading)
    limit: int | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None

    def files(self) -> list[str]:
        """Return the files, in the order in which their rows are counted.

        Raises:
            UsageError: None is there.
        """
        path = self.path
        if path.startswith(HUB) or os.path.isfile(path):
            return [path]
        if os.path.isdir(path):
            return [path] if tables.is_saved(Path(path)) else _in_folder(path)
        found = _matching(path)
        if not found:
            raise UsageError(
                f"no data file {path}; give a LLaVA json, a messages jsonl, parquet or tar shards, "
                "a folder of them, or hub:OWNER/NAME"
            )
        return found

    def open(self, file: str) -> RecordFile:
        """Open one of the files.

        Raises:
            UsageError: Nothing does.
        """
        table = partial(tables.open_table, file, self.split, self.subset, self.revision)
        if file.startswith(HUB) or os.path.isdir(file):
            return table()
        if self.split != "train":
            raise UsageError(
                f"split: {self.split} is of a set of the Hub, or of one that datasets saved, and "
                f"{file} is neither; leave split out, or name the file of that split"
            )
        if file.lower().endswith(_COMPRESSED):
            raise UsageError(
                f"{file} is compressed, so that no row of it can be read by itself; unpack it"
            )
        ending = os.path.splitext(file)[1].lower()
        if ending == ".parquet":
            return table()
        return tar_files.TarFile(file) if ending == ".tar" else json_file(file)

    def folder(self, file: str) -> str | None:
        """Return the folder that image paths of a file start from, as a whole path.

        Raises:
            UsageError: It is not there.
        """
        if self.images is None and file.startswith(HUB):
            return None
        folder = Path(self.images) if self.images is not None else Path(file).parent
        if not folder.is_dir():
            raise UsageError(
                f"no image folder {folder}; give the folder that image paths start from"
            )
        return os.path.abspath(folder)


class Checks(Frozen):
    """Conditions that a row must meet.

    Attributes:
        images: Refuse a row whose image file is missing now, not when it is used.
        on_bad: Called with each row that cannot be used, which is left out; None raises instead.
        leave_out: Keys (see ``BadRow.key``) of rows that are not looked at.
        accept: Raises UsageError for a row that shall count as bad.
        one: Refuse a source that has not one row to use.
    """

    images: bool = True
    on_bad: OnBad | None = None
    leave_out: Collection[tuple[str, str]] = ()
    accept: Callable[[Row], object] = lambda row: None
    one: bool = True


def read_rows(
    path: str | Path,
    images: str | Path | None = None,
    format: layouts.Format = "auto",
    limit: int | None = None,
    check_images: bool = True,
) -> list[Row]:
    """Read all rows of a file into memory; ``index_rows`` leaves them where they are.

    A file of JSON is a list or one object a line. ``docs/data.md`` shows a row of each layout.

    Args:
        path: The file; for what else it may be, see ``Source``.
        images: The folder that image paths start from, and must not leave; by default the file's.
        format: Layout of the rows; "auto" tells it by their keys.
        limit: Read this many rows, from the first.
        check_images: See ``Checks``.

    Raises:
        UsageError: Naming file, row and what is wrong.
    """
    folder = None if images is None else str(images)
    source = Source(str(path), folder, layouts.Reading(format), limit)
    return list(index_rows(source, Checks(check_images)))


def index_rows(source: Source, checks: Checks | None = None) -> RowIndex:
    """Read and check all rows once, and keep where they lie.

    Args:
        source: The files.
        checks: What a row must be.

    Raises:
        UsageError: Naming file, row and what is wrong.
    """
    checks = checks or Checks()
    parts: list[FileRows] = []
    left = source.limit
    for file, folder in _opened(source):
        positions, numbers, facts = array("q"), array("I"), FactsBuilder()
        first = 0
        good = islice(_good(file, folder, source, checks), left)
        for found, row in counted(f"reading rows of {file}", good):
            positions.append(found.position)
            numbers.append(found.number)
            facts.add(row)
            first += row.images_first
        if first:
            _log.warning(
                "%s: %d rows list images and write <image> for none; they are put before the first "
                "turn of a user",
                file.file,
                first,
            )
        places = np.array(positions, dtype=np.int64), np.array(numbers, dtype=np.uint32)
        rows = FileRows(file, folder, source.reading, *places, facts.facts())
        parts.append(rows)
        left = None if left is None else left - len(rows)
        if left == 0:
            break
    index = parts[0] if len(parts) == 1 else Joined(parts)
    if not len(index):
        _refuse_none(source, checks)
    return index


def row_at(sources: Sequence[Source], number: int) -> Row:
    """Read one row, counted from 1 over all files of all sources; the others are not looked at.

    Of a source with a limit, its first rows are counted.

    Raises:
        UsageError: As ``read_rows``, for this row; or there are fewer.
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


def records(source: Source) -> Iterator[tuple[str, Record]]:
    """Yield every record and its place; of one of several files the file's name stands first.

    Raises:
        UsageError: A file that cannot be read, or a record in it; names file and place.
    """
    files = source.files()
    for name in files:
        file, shard = source.open(name), f"{os.path.basename(name)} " if len(files) > 1 else ""
        for found in file.scan():
            if isinstance(found.record, UsageError):
                raise found.record
            yield f"{shard}{file.unit} {found.number}", found.record


def _opened(source: Source) -> Iterator[tuple[RecordFile, str | None]]:
    """Yield every file, and the folder that its image paths start from."""
    for file in source.files():
        folder = source.folder(file)
        yield source.open(file), folder


def _good(
    file: RecordFile, folder: str | None, source: Source, checks: Checks
) -> Iterator[tuple[Found, Row]]:
    """Yield the rows that can be used."""
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
            data = getattr(found.record, "data", None)
            index = id_of(data, source.reading) if isinstance(data, dict) else None
            checks.on_bad(BadRow(whole, place, index, fault_of(error), str(error)))
            continue
        yield found, row


def _row(
    file: RecordFile, folder: str | None, source: Source, found: Found, check_images: bool
) -> Row:
    if isinstance(found.record, UsageError):
        raise found.record
    reader = RowReader(file.file, folder, source.reading, check_images, found.record.images)
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


def is_there(path: str) -> bool:
    """Tell whether a name stands for rows: of the Hub, a file, shards in a folder, a pattern."""
    if path.startswith(HUB) or os.path.isfile(path):
        return True
    if os.path.isdir(path):
        return tables.is_saved(Path(path)) or bool(_shards(path))
    return bool(_matching(path))


def _shards(folder: str) -> list[str]:
    return [
        os.path.join(folder, name)
        for name in sorted(os.listdir(folder))
        if name.lower().endswith(ENDINGS)
        and not name.startswith(".")  # as in a pattern
        and os.path.isfile(os.path.join(folder, name))
    ]


def _in_folder(folder: str) -> list[str]:
    found = _shards(folder)
    if not found:
        raise UsageError(
            f"the folder {folder} holds no shards to read; give one with "
            f"{', '.join(ENDINGS)} files, or a pattern such as FOLDER/**/*.tar"
        )
    for name in sorted(os.listdir(folder)):
        unpacked, packed = os.path.splitext(name)
        there = os.path.join(folder, unpacked) in found
        if packed.lower() in _COMPRESSED and unpacked.lower().endswith(ENDINGS) and not there:
            raise UsageError(
                f"{os.path.join(folder, name)} is compressed, and would be left out beside "
                f"{os.path.basename(found[0])}; unpack it, or name the files with a pattern"
            )
    return found


def _matching(pattern: str) -> list[str]:
    """Return files of a pattern, in order of their names; of a range, in order of its numbers.

    Raises:
        UsageError: A number of a range is missing, though others are there.
    """
    found: list[str] = []
    missing: list[str] = []
    for one in _ranges(pattern):
        files = [file for file in sorted(glob.glob(one, recursive=True)) if os.path.isfile(file)]
        found += files
        missing += [] if files else [one]
    if found and missing:
        raise UsageError(
            f"{pattern}: {len(missing)} of its files are not there, the first {missing[0]}; "
            "download them, or write the range that is there"
        )
    return list(dict.fromkeys(found))  # {1..10}* finds 10 twice


def _ranges(pattern: str) -> Sequence[str]:
    """Return ``{000..127}`` written out."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    written: list[str] = []
    for number in range(int(first), int(last) + 1):
        text = pattern[: found.start()] + f"{number:0{len(first)}}" + pattern[found.end() :]
        written += _ranges(text)
    return written
