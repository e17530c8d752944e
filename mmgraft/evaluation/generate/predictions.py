"""Predictions of a set as a file that grows a line at a time, and survives a kill. Free of torch.

The first line says what was asked of what: the fingerprints of graft, set and settings. A file
whose first line differs is put aside, so that no answer of another model is ever taken.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmgraft.atomic import free_name
from mmgraft.data.chat.content import image_of, is_image
from mmgraft.data.images import is_data_uri
from mmgraft.errors import MMGraftError
from mmgraft.evaluation.items.item import Item

VERSION = 1
FOLDER = "predictions"
"""Inside the results of a run."""


class Predictions:
    """A jsonl of one object an item.

    Args:
        path: The file; its folder is made.
        asked: What is asked of what, plain data; see :func:`fingerprint_items`.

    Attributes:
        done: Objects found in the file and added since, by id.
        put_aside: Where a file of other questions or another model was moved to.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        self.put_aside: Path | None = None
        self._header = {"mmgraft_predictions": VERSION, **json.loads(json.dumps(asked))}
        self._begun = path.is_file() and self._take_in()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append objects, each with its `id`, and see them onto the disk.

        Raises:
            MMGraftError: The disk is full or cannot be written to; what was there stays.
        """
        new = [dict(row) for row in rows]
        lines = new if self._begun else [self._header, *new]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MMGraftError(
                f"could not write {self.path} ({error}); the answers before are kept. Make room "
                "and run the command again: it goes on from there"
            ) from error
        self._begun = True
        self.done.update((str(row["id"]), row) for row in new)

    def _take_in(self) -> bool:
        """Read what an earlier run wrote, and cut off a line that it did not finish."""
        header, found, whole = _read(self.path)
        if header is None:
            self.path.unlink()
            return False
        if header != self._header:
            self.put_aside = free_name(self.path)
            self.path.replace(self.put_aside)
            return False
        self.done = found
        if whole < self.path.stat().st_size:
            with self.path.open("rb+") as file:
                file.truncate(whole)
        return True


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of predictions, without its first line; a half line is left out."""
    return list(_read(path)[1].values()) if path.is_file() else []


def fingerprint_items(items: Sequence[Item]) -> str:
    """SHA-256 of what is asked: ids, messages, options and the bytes of images, not their paths."""
    digest = hashlib.sha256()
    images: dict[str, str] = {}
    for item in items:
        asked = [item.id, [_plain(message, images) for message in item.messages], item.options]
        digest.update(json.dumps(asked, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()


def _plain(message: Mapping[str, Any], images: dict[str, str]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    parts = [_digest(image_of(part), images) if is_image(part) else part for part in content]
    return {**message, "content": parts}


def _digest(image: Any, known: dict[str, str]) -> str:
    """SHA-256 of an image's file, of the text that holds it, or of its pixels."""
    if not isinstance(image, str):
        return hashlib.sha256(image.tobytes()).hexdigest()
    if image not in known:
        own = is_data_uri(image)
        data = image.encode() if own else Path(image.removeprefix("file://")).read_bytes()
        known[image] = hashlib.sha256(data).hexdigest()
    return known[image]


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]], int]:
    """First line, objects by id, and the bytes up to the end of the last line that is whole."""
    header: dict[str, Any] | None = None
    found: dict[str, dict[str, Any]] = {}
    whole = 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line.decode()) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict) or (header is not None and "id" not in row):
                break  # from here on nothing can be trusted
            if header is None:
                header = row
            else:
                found[str(row["id"])] = row
            whole += len(line)
    return header, found, whole
