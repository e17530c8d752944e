"""What a packaged set is going to write, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Writer = Callable[[Path], object]


@dataclass(frozen=True)
class Draft:
    """The files of a set.

    Attributes:
        writers: Name to a function that writes the file or makes the folder. They are put in place
            in this order, so that pictures come before the rows that name them.
        rows: How many rows each file of rows has.
        notes: What else the source file of the set should say, such as what was left out.
    """

    writers: dict[str, Writer]
    rows: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def rows_writer(rows: Sequence[Mapping[str, Any]]) -> Writer:
    """Writes rows as jsonl."""

    def write(path: Path) -> None:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return write


def copy_writer(source: Path) -> Writer:
    """Copies a file."""
    return lambda path: shutil.copyfile(source, path)


def link_writer(source: Path) -> Writer:
    """Makes a second name for a large file; copies it where the disk cannot do that."""

    def write(path: Path) -> None:
        try:
            os.link(source, path)
        except OSError:
            shutil.copyfile(source, path)

    return write
