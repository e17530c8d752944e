"""Rows from files: LLaVA's json and OpenAI-style messages, local images only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from mmgraft.data.bad_rows import BadRow, absolute, fault_of
from mmgraft.data.content import image_of, is_image
from mmgraft.data.images import is_data_uri, refuse_web
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.model.vision.images import BadImage

OnBad = Callable[[BadRow], None]
Format = Literal["auto", "llava", "messages"]

LLAVA_IMAGE = "<image>"
"""What stands for an image in LLaVA's json, and there alone: elsewhere it is ordinary text."""

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read_rows(
    path: str | Path,
    images: str | Path | None = None,
    format: Format = "auto",
    limit: int | None = None,
    check_images: bool = True,
    on_bad: OnBad | None = None,
    leave_out: Collection[tuple[str, str]] = (),
    accept: Callable[[Row], object] = lambda row: None,
) -> list[Row]:
    """Read a file of rows.

    The file is a JSON list or one JSON object a line. A row is one of

    - LLaVA's: `{"id", "image": path or list, "conversations": [{"from": "human", "value": ...}]}`,
      where every `<image>` in a value is one of the images, in order;
    - messages: `{"messages": [{"role", "content"}]}`, content a text or a list of
      `{"type": "text", "text"}`, `{"type": "image", "image": path}` and
      `{"type": "image_url", "image_url": {"url": path or data URI}}`; `{"type": "image"}` alone
      takes the next of a list `"images"` beside the messages.

    Args:
        path: the file.
        images: the folder that image paths start from, and must not leave; by default the file's.
        format: "auto" tells the two kinds of rows apart by their keys.
        limit: read this many rows, from the first.
        check_images: refuse a row whose image file is missing now, not when it is used.
        on_bad: told of each row that cannot be used, which is left out; None raises instead.
        leave_out: keys (see `BadRow.key`) of rows that are not looked at.
        accept: raises UsageError for a row that shall count as bad.

    Raises:
        UsageError: naming file, row and what is wrong.
    """
    path = Path(path)
    folder = Path(images) if images is not None else path.parent
    if not path.is_file():
        raise UsageError(f"no data file {path}; give a LLaVA json or a messages jsonl")
    if not folder.is_dir():
        raise UsageError(f"no image folder {folder}; give the folder that image paths start from")
    reader = RowReader(str(path), os.path.abspath(folder), format, check_images)
    rows: list[Row] = []
    whole = absolute(str(path))
    for place, data in records(path, on_bad):
        if limit is not None and len(rows) >= limit:
            break
        if (whole, place) in leave_out:
            continue
        try:
            row = reader.row(place, data)
            accept(row)
        except UsageError as error:
            if on_bad is None:
                raise
            index = data.get("id") if isinstance(data, dict) else None
            index = None if index is None else str(index)
            on_bad(BadRow(whole, place, index, fault_of(error), str(error)))
            continue
        rows.append(row)
    if not rows and limit != 0:
        raise UsageError(f"{path} has no rows; give a file with at least one")
    return rows


def records(path: Path, on_bad: OnBad | None = None) -> Iterator[tuple[str, Any]]:
    """Every record of a file and its place, from a JSON list or from lines of JSON.

    Raises:
        UsageError: for what is not JSON; of lines `on_bad` is told instead, where it is given.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(1)
            while start and start.isspace():
                start = file.read(1)
            file.seek(0)
            if start != "[":
                yield from _lines(path, file, on_bad)
                return
            try:
                listed = json.load(file)
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"{path}, line {error.lineno}: not JSON ({error.msg}); correct the file"
                ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}); convert it") from error
    for number, record in enumerate(listed, start=1):
        yield f"row {number}", record


def _lines(path: Path, file: Any, on_bad: OnBad | None) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            reason = (
                f"{path}, {place}: not JSON ({error.msg}); write one object a line, or the whole "
                "file as one list"
            )
            if on_bad is None:
                raise UsageError(reason) from error
            on_bad(BadRow(absolute(str(path)), place, None, "row", reason))
            continue
        yield place, record


def row_at(
    path: str | Path, number: int, images: str | Path | None = None, format: Format = "auto"
) -> Row:
    """One row of a file, counted from 1; the others are not looked at.

    Raises:
        UsageError: as `read_rows`, for this row; or there are fewer.
    """
    path = Path(path)
    folder = Path(images) if images is not None else path.parent
    reader = RowReader(str(path), os.path.abspath(folder), format, check_images=False)
    count = 0
    for count, (place, data) in enumerate(records(path), start=1):
        if count == number:
            return reader.row(place, data)
    raise UsageError(f"{path} has {count} rows, so none is number {number}; ask for one up to that")


class RowReader:
    """Reads the records of one file."""

    def __init__(self, file: str, folder: str, format: Format, check_images: bool):
        self.file, self.folder, self.format = file, folder, format
        self.check_images = check_images

    def row(self, place: str, data: Any) -> Row:
        """One record as a row.

        Raises:
            UsageError: naming file, row and what is wrong.
        """
        where = f"{self.file}, {place}"
        if not isinstance(data, dict):
            raise UsageError(
                f"{where}: a {type(data).__name__}, not an object; write a LLaVA row or messages"
            )
        index = str(data.get("id", place.split()[-1]))
        where = f"{where} (id {index})"
        kind = self._kind(data, where)
        messages = self._llava(data, where) if kind == "llava" else self._messages(data, where)
        return Row(index, messages, self.file, place, data.get("tools") or None)

    def _kind(self, data: dict[str, Any], where: str) -> str:
        keys = {"llava": "conversations", "messages": "messages"}
        wanted = [self.format] if self.format != "auto" else list(keys)
        for kind in wanted:
            if keys[kind] in data:
                return kind
        names = " or ".join(repr(keys[kind]) for kind in wanted)
        there = ", ".join(map(repr, data)) or "nothing"
        raise UsageError(f"{where}: no {names} in it but {there}; write a LLaVA row or messages")

    def _llava(self, data: dict[str, Any], where: str) -> list[dict[str, Any]]:
        turns = data["conversations"]
        if not isinstance(turns, list) or not turns:
            raise UsageError(f"{where}: 'conversations' is not a list of turns; write at least one")
        images = _listed(data, where)
        messages: list[dict[str, Any]] = []
        queue = list(images)
        found = 0
        for number, turn in enumerate(turns, start=1):
            at = f"{where}, turn {number}"
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
                raise UsageError(f"{at}: not {{'from': ..., 'value': text}}; correct the turn")
            role = _SPEAKERS.get(str(turn.get("from")).lower())
            if role is None:
                raise UsageError(
                    f"{at}: 'from' is {turn.get('from')!r}; write one of {', '.join(_SPEAKERS)}"
                )
            pieces = turn["value"].split(LLAVA_IMAGE)
            found += len(pieces) - 1
            messages.append({"role": role, "content": self._fill(pieces, queue, where)})
        if found != len(images):
            raise UsageError(
                f"{where}: {len(images)} images are listed, but {LLAVA_IMAGE} occurs {found} times "
                "in its values; write one for each image (a text that really says it can be given "
                "as messages)"
            )
        return messages

    def _fill(self, pieces: list[str], queue: list[Any], where: str) -> str | list[dict[str, Any]]:
        if len(pieces) == 1:
            return pieces[0]
        parts: list[dict[str, Any]] = []
        for index, piece in enumerate(pieces):
            if index and queue:
                parts.append({"type": "image", "image": self.resolve(queue.pop(0), where)})
            if piece:
                parts.append({"type": "text", "text": piece})
        return parts

    def _messages(self, data: dict[str, Any], where: str) -> list[dict[str, Any]]:
        turns = data["messages"]
        if not isinstance(turns, list) or not turns:
            raise UsageError(f"{where}: 'messages' is not a list of messages; write at least one")
        listed = _listed(data, where)
        queue = list(listed)
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(turns, start=1):
            at = f"{where}, turn {number}"
            if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
                raise UsageError(f"{at}: not {{'role': ..., 'content': ...}}; correct the message")
            content = turn.get("content")
            if isinstance(content, list):
                content = [self._part(part, queue, at) for part in content]
            elif not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
                raise UsageError(f"{at}: 'content' is neither a text nor a list; write one of them")
            messages.append({**turn, "content": content} if "content" in turn else dict(turn))
        if queue:
            raise UsageError(
                f"{where}: {len(listed)} images are listed, but {len(listed) - len(queue)} parts "
                'take one; write {"type": "image"} for each image'
            )
        return messages

    def _part(self, part: Any, queue: list[Any], at: str) -> dict[str, Any]:
        if is_image(part):
            image = image_of(part)
            if image is None and not queue:
                raise UsageError(
                    f'{at}: an image part without an image; write "image": PATH in it, or one more '
                    'path in the row\'s "images"'
                )
            image = queue.pop(0) if image is None else image
            return {"type": "image", "image": self.resolve(image, at)}
        if (
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
        ):
            return part
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise UsageError(f"{at}: a content part of type {kind!r}; write text or image parts")

    def resolve(self, image: Any, where: str) -> str:
        """An image's path as a file inside the image folder; a data URI stays as it is.

        Raises:
            UsageError: it is no path, an address, outside of the folder, or missing.
        """
        if not isinstance(image, str) or not image:
            raise UsageError(f"{where}: an image that is no path ({image!r}); write its path")
        if is_data_uri(image):
            return image
        refuse_web(image, where)
        path = os.path.normpath(os.path.join(self.folder, image.removeprefix("file://")))
        if os.path.commonpath([self.folder, path]) != self.folder:
            raise BadImage(
                f"{where}: the image {image} lies outside of the image folder {self.folder}; set "
                "the image folder to one that holds it",
                "outside",
            )
        if self.check_images and not os.path.isfile(path):
            raise BadImage(
                f"{where}: image file not found: {path}; set the folder that image paths start "
                "from, or leave the row out",
                "missing",
            )
        return path


def _listed(data: dict[str, Any], where: str) -> list[Any]:
    """The images beside the turns: one path, a list of them, or none."""
    listed: list[Any] = []
    for key in ("image", "images"):
        value = data.get(key)
        if isinstance(value, list):
            listed += value
        elif value is not None and value != "":
            listed.append(value)
    if any(not isinstance(image, str) for image in listed):
        raise UsageError(f"{where}: the images beside the turns are not paths; write paths")
    return listed
