"""Records of a file of items, whatever it is written in: JSON, lines of JSON, CSV or plain text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmgraft.data.formats.record_files import Record
from mmgraft.data.formats.sources import records
from mmgraft.errors import UsageError
from mmgraft.textfiles import read_text

STRUCTURED = (".json", ".jsonl", ".parquet", ".tar", ".csv", ".tsv")
"""Endings of files that hold records; any other file is one text."""

_HEADINGS = frozenset({"question", "answer"})


def item_records(path: Path, known: Sequence[str] = ()) -> list[tuple[str, Record]]:
    """Read every record of a file, and its place: "line 12" or "row 12", counted from 1.

    A CSV file has a heading when its first line names a ``question``, an ``answer`` or one of
    ``known``; one without is read as MMLU's: question, options, and the right one's letter.

    Args:
        path: The file.
        known: Further names that a heading may have.

    Raises:
        UsageError: There is no such file, or it cannot be read; names the place.
    """
    if not path.is_file():
        raise UsageError(f"no data file {path}; give a jsonl, json or csv of items")
    if path.suffix.lower() in (".csv", ".tsv"):
        found = [(place, Record(data)) for place, data in _table(path, known)]
    elif path.suffix.lower() in STRUCTURED:
        found = list(records(path))
    else:
        found = [("line 1", Record({"text": read_text(path)}))]
    for place, record in found:
        if not isinstance(record.data, dict):
            raise UsageError(
                f"{path}, {place}: {str(record.data)[:40]!r} is no object; write one for each item"
            )
    if not found:
        raise UsageError(f"{path} has no items; give a file with at least one")
    return found


def _table(path: Path, known: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    heading: list[str] | None = None
    width = 0
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(f"{path}, line {begin}: not CSV ({error}); correct it") from error
        if not any(cell.strip() for cell in cells):
            continue
        if not width:
            width = len(cells)
            names = [cell.strip() for cell in cells]
            if {name.lower() for name in names} & _HEADINGS or set(names) & set(known):
                heading = names
                continue
        place = f"line {begin}"
        if len(cells) != width:
            raise UsageError(
                f"{path}, {place}: {len(cells)} columns, and {width} in the first line; put a text "
                "with a comma or a line break in double quotes"
            )
        yield place, _record(path, place, cells, heading)


def _record(path: Path, place: str, cells: list[str], heading: list[str] | None) -> dict[str, Any]:
    if heading is not None:
        return dict(zip(heading, cells, strict=True))
    if len(cells) < 4:
        raise UsageError(
            f"{path}, {place}: {len(cells)} columns and no heading; write question, at least two "
            "options and the letter of the right one, or a first line that names the columns"
        )
    return {"question": cells[0], "options": cells[1:-1], "answer": cells[-1]}
