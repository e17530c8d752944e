"""A packaged set before it is written, and its way to a folder: whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any

from mmgraft.atomic import atomic_json, complete, replace_together
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen

Writer = Callable[[Path], object]


class Draft(Frozen):
    """The files of a set.

    Attributes:
        writers: Name to a function that writes the file or makes the folder. They are put in place
            in this order, so that images come before the rows that name them.
        rows: Number of rows in each file of rows.
        notes: Further entries of the set's source file, such as what was left out.
    """

    writers: dict[str, Writer]
    rows: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_rows(
        cls,
        files: Mapping[str, Sequence[Mapping[str, Any]]],
        images: Writer | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> "Draft":
        """Plan jsonl files, and the folder ``images`` that they name.

        Args:
            files: Name of each file to its rows.
            images: Fills the folder.
            notes: Further entries of the source file.
        """
        writers: dict[str, Writer] = {} if images is None else {"images": images}
        writers |= {name: partial(write_rows, rows) for name, rows in files.items()}
        return cls(writers, {name: len(rows) for name, rows in files.items()}, dict(notes or {}))


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows as jsonl."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def copy_or_link(source: Path, path: Path) -> None:
    """Make a second name for a file of weights, where the disk can do that; copy any other."""
    if source.suffix == ".safetensors":
        with suppress(OSError):
            os.link(source, path)
            return
    shutil.copyfile(source, path)


def check_target(draft: Draft, out: Path, name: str, force: bool) -> tuple[str, ...]:
    """Return the names to be written, if they may be.

    Raises:
        UsageError: One of them is there already, without ``force``; or a folder is, without the
            source file that says who wrote it.
    """
    source = f"{name}.source.json"
    names = (*draft.writers, source)
    there = [out / file for file in names if (out / file).exists()]
    if there and not force:
        raise UsageError(
            f"{there[0]} is there already; give --force to write over it, or another --out"
        )
    foreign = [path for path in there if path.is_dir() and not (out / source).is_file()]
    if foreign:
        raise UsageError(
            f"the folder {foreign[0]} was not written by this command (there is no {source} beside "
            "it); move it away, or name another --out"
        )
    return names


def write_set(
    draft: Draft, out: Path, name: str, about: Mapping[str, Any], force: bool = False
) -> tuple[str, ...]:
    """Write a set, and NAME.source.json beside it with the SHA-256 of each file of rows.

    Args:
        draft: The files.
        out: The folder; made where it is missing. Other files in it stay.
        name: Of the set.
        about: Entries of the source file: licence, seed and the like.
        force: Replace files of these names that stand there.

    Returns:
        Names of the files and folders written.

    Raises:
        UsageError: A file is there already.
        MMGraftError: The disk is full.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder with --out")
    complete(out)
    names = check_target(draft, out, name, force)
    sums: dict[str, str] = {}

    def write(file: str, path: Path) -> None:
        draft.writers[file](path)
        if file in draft.rows:
            sums[file] = hashlib.sha256(path.read_bytes()).hexdigest()

    def write_source(path: Path) -> None:
        entries = {"name": name, **about, "rows": draft.rows, "sha256": sums, **draft.notes}
        atomic_json(path, entries)

    writers: dict[str, Writer] = {file: partial(write, file) for file in draft.writers}
    replace_together(out, {**writers, names[-1]: write_source})
    return names
