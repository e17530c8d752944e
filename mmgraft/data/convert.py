"""Rows of any layout, written as messages: lines of JSON or a parquet file."""

import hashlib
import io
import json
import os
from base64 import b64encode
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mmgraft.atomic import atomic_folder, atomic_write
from mmgraft.data.chat.turns import images_of_all, is_image
from mmgraft.data.formats.tables import require_datasets
from mmgraft.data.images import check_image, image_bytes
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen

#: Ways to write images: as paths, as bytes in the file, or as files beside it.
ImageData = Literal["paths", "embed", "beside"]

Placed = tuple[bytes | None, str]
Place = Callable[[Row], list[Placed]]

#: Rows of a parquet file that are written together.
_GROUP = 256


class Conversion(Frozen):
    """Writes rows as messages; a part ``{"type": "image"}`` takes the next of a list ``images``.

    Attributes:
        out: A ``.jsonl`` or ``.parquet`` file.
        images: Way to write images; None where no row has one.
        folder: That paths are written from, for ``paths``.
    """

    out: Path
    images: ImageData | None
    folder: str

    @property
    def beside(self) -> Path:
        """The folder of images that are written beside the file."""
        return self.out.with_name(f"{self.out.stem}-images")

    def write(self, rows: Sequence[Row]) -> None:
        """Write rows, read one after another; the file appears when it is whole.

        Raises:
            UsageError: It is not said what becomes of images, or one has no path or is broken.
        """
        if self.images is None and any(row.has_image for row in rows):
            raise UsageError(
                "the rows have images; write --image-data paths, embed (their bytes in the file) "
                "or beside (files in a folder next to it)"
            )
        table = self.out.suffix == ".parquet"
        if table:
            require_datasets(str(self.out))
        if self.images == "beside":
            atomic_folder(self.beside, lambda folder: _write_images(rows, folder))
        write = _write_table if table else _write_lines
        atomic_write(self.out, lambda path: write(path, rows, self._placed))

    def _placed(self, row: Row) -> list[Placed]:
        """Return the bytes that are written of each image, or None, and its path or data URI."""
        if self.images == "paths":
            return [(None, self._path(image, row)) for image in images_of_all(row.messages)]
        held = _held(row)
        if self.images == "beside":
            return [(None, f"{self.beside.name}/{name}") for _, name in held]
        return [
            (data, f"data:image/{name.rpartition('.')[2]};base64,{b64encode(data).decode()}")
            for data, name in held
        ]

    def _path(self, image: Any, row: Row) -> str:
        if not isinstance(image, str) or not os.path.isfile(image):
            raise UsageError(f"{row.where}: its image is no file; write --image-data embed, beside")
        return os.path.relpath(image, self.folder)


def _held(row: Row) -> list[tuple[bytes, str]]:
    """Return the bytes of a row's images, each with a name made of them."""
    found = []
    for image in images_of_all(row.messages):
        check_image(image, row.where)
        data = image_bytes(image, row.where)
        with Image.open(io.BytesIO(data)) as opened:
            kind = str(opened.format).lower()
        found.append((data, f"{hashlib.sha256(data).hexdigest()[:24]}.{kind}"))
    return found


def _write_images(rows: Sequence[Row], folder: Path) -> None:
    for data, name in (one for row in rows for one in _held(row)):
        (folder / name).write_bytes(data)


def _write_lines(path: Path, rows: Sequence[Row], placed: Place) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            images = [name for _, name in placed(row)]
            line = {"id": row.id, "messages": _messages(row, bool(images))}
            line |= {"images": images} if images else {}
            line |= {"tools": row.tools} if row.tools else {}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _messages(row: Row, parts: bool) -> list[dict[str, Any]]:
    """Return a row's turns, images left out of their parts; with ``parts`` no content is a text."""
    turns = []
    for turn in row.messages:
        content = turn.get("content")
        if isinstance(content, list):
            content = [{"type": "image"} if is_image(part) else part for part in content]
        elif isinstance(content, str) and parts:
            content = [{"type": "text", "text": content}]
        turns.append({**turn, "content": content})
    return turns


def _write_table(path: Path, rows: Sequence[Row], placed: Place) -> None:
    """Write a parquet file; turns that have more keys than role and content are JSON in a text."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, List, Value

    plain = all(turn.keys() <= {"role", "content"} for row in rows for turn in row.messages)
    text = Value("string")
    turns = List({"role": text, "content": List({"type": text, "text": text})})
    columns = {"id": text, "messages": turns if plain else text, "images": List(Image())}
    schema = Features({**columns, "tools": text}).arrow_schema

    def record(row: Row) -> dict[str, Any]:
        said = _messages(row, True)
        return {
            "id": row.id,
            "messages": said if plain else json.dumps(said),
            "images": [{"bytes": d, "path": None if d else p} for d, p in placed(row)],
            "tools": json.dumps(row.tools) if row.tools else None,
        }

    left = map(record, rows)
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(left, _GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema))
