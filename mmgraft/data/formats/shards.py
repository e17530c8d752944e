"""Which files a name stands for, and what reads each."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmgraft.data.bad_rows import HUB
from mmgraft.data.formats.reader import Format
from mmgraft.data.formats.record_files import RecordFile, json_file
from mmgraft.data.formats.tables import hub_table, is_saved, parquet_table, saved_table
from mmgraft.data.formats.tar_files import TarFile
from mmgraft.errors import UsageError

ENDINGS = (".json", ".jsonl", ".parquet", ".tar")
"""Of files that a folder of shards is made of."""
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Source:
    """Rows that belong together: a file, or the shards of one set.

    Attributes:
        path: a file, a folder of shards, a pattern (`shards/*.tar`, `{000..127}.tar`), a folder
            that `datasets` saved, or `hub:OWNER/NAME`.
        images: the folder that image paths start from; None: each file's own.
        format: "auto" tells LLaVA's rows from messages by their keys.
        limit: the first rows only.
        split: of a set of `datasets`.
        subset: of a set of the Hub.
        revision: of a set of the Hub.
    """

    path: str
    images: str | None = None
    format: Format = "auto"
    limit: int | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None

    def files(self) -> list[str]:
        """The files, in the order in which their rows are counted.

        Raises:
            UsageError: none is there.
        """
        path = self.path
        if path.startswith(HUB) or os.path.isfile(path):
            return [path]
        if os.path.isdir(path):
            return [path] if is_saved(Path(path)) else _in_folder(path)
        found = _matching(path)
        if not found:
            raise UsageError(
                f"no data file {path}; give a LLaVA json, a messages jsonl, parquet or tar shards, "
                "a folder of them, or hub:OWNER/NAME"
            )
        return found

    def open(self, file: str) -> RecordFile:
        """What reads one of the files.

        Raises:
            UsageError: nothing does.
        """
        if file.startswith(HUB):
            return hub_table(file, self.split, self.subset, self.revision)
        if os.path.isdir(file):
            return saved_table(file, self.split)
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
            return parquet_table(file)
        return TarFile(file) if ending == ".tar" else json_file(file)

    def folder(self, file: str) -> str | None:
        """The folder that image paths of a file start from, as a whole path.

        Raises:
            UsageError: it is not there.
        """
        if self.images is None and file.startswith(HUB):
            return None
        folder = Path(self.images) if self.images is not None else Path(file).parent
        if not folder.is_dir():
            raise UsageError(
                f"no image folder {folder}; give the folder that image paths start from"
            )
        return os.path.abspath(folder)


def is_there(path: str) -> bool:
    """Whether a name stands for rows: one of the Hub's, a file, shards in a folder, a pattern."""
    if path.startswith(HUB) or os.path.isfile(path):
        return True
    if os.path.isdir(path):
        return is_saved(Path(path)) or bool(_shards(path))
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
    """Files of a pattern, in order of their names; of a range, in order of its numbers.

    Raises:
        UsageError: a number of a range is missing, though others are there.
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
    """`{000..127}` written out."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    written: list[str] = []
    for number in range(int(first), int(last) + 1):
        text = pattern[: found.start()] + f"{number:0{len(first)}}" + pattern[found.end() :]
        written += _ranges(text)
    return written
