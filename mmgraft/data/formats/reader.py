"""A record of a file as a row: LLaVA's turns and OpenAI-style messages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from mmgraft.data.chat.content import image_of, is_image
from mmgraft.data.chat.turns import (
    PART_KEYS,
    ROW_KEYS,
    TEMPLATE_KEYS,
    TURN_KEYS,
    clean_turn,
    refuse_unread,
    role_of,
    tools_of,
    with_system,
)
from mmgraft.data.images import is_data_uri, path_of, refuse_web
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError, brief
from mmgraft.vision.images import BadImage
from mmgraft.vision.stored import StoredImage

Format = Literal["auto", "llava", "messages"]

LLAVA_IMAGE = "<image>"
"""What stands for an image in LLaVA's json, and there alone: elsewhere it is ordinary text."""

_LONGEST_NAME = 1000
"""Characters; what is longer is hardly a path."""
_DEEPEST = 100
"""Lists and objects in each other."""


class RowReader:
    """Reads the records of one file."""

    def __init__(
        self,
        file: str,
        folder: str | None,
        format: Format,
        check_images: bool,
        images: Mapping[str, StoredImage] | None = None,
    ):
        """Choose how the records are read.

        Args:
            file: Names them in errors.
            folder: That image paths start from, a whole path; None where there is none.
            format: "auto" tells the two kinds of rows apart by their keys.
            check_images: Refuse a row whose image file is missing now, not when it is used.
            images: Of the record, by name, where they lie beside it in a file of many; then its
                paths name these and no others.
        """
        self.file, self.folder, self.format = file, folder, format
        self.check_images = check_images
        self.images = images

    def row(self, place: str, data: Any) -> Row:
        """Read one record as a row.

        Raises:
            UsageError: Naming file, row and what is wrong.
        """
        where = f"{self.file}, {place}"
        if not isinstance(data, dict):
            raise UsageError(
                f"{where}: a {type(data).__name__}, not an object; write a LLaVA row or messages"
            )
        index = id_of(data) or place.split()[-1]
        where = f"{where} (id {index})"
        kind = self._kind(data, where)
        _check_text(data, where)
        refuse_unread(data, ROW_KEYS, where)
        messages = self._llava(data, where) if kind == "llava" else self._messages(data, where)
        messages = with_system(messages, data, where)
        return Row(index, messages, self.file, place, tools_of(data, where))

    def _kind(self, data: dict[str, Any], where: str) -> str:
        keys = {"llava": "conversations", "messages": "messages"}
        wanted = [self.format] if self.format != "auto" else list(keys)
        for kind in wanted:
            if keys[kind] in data:
                return kind
        names = " or ".join(repr(keys[kind]) for kind in wanted)
        there = brief(", ".join(map(repr, data)) or "nothing")
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
            refuse_unread(turn, TURN_KEYS, at)
            role = role_of(turn.get("from"), at)
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
            refuse_unread(turn, (*TURN_KEYS, *TEMPLATE_KEYS), at)
            turn = clean_turn(turn, at)
            content = turn.get("content")
            if isinstance(content, list):
                content = [self._part(part, queue, at) for part in content]
            elif not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
                raise UsageError(f"{at}: 'content' is neither a text nor a list; write one of them")
            messages.append({**turn, "content": content} if "content" in turn else turn)
        if queue:
            raise UsageError(
                f"{where}: {len(listed)} images are listed, but {len(listed) - len(queue)} parts "
                'take one; write {"type": "image"} for each image'
            )
        return messages

    def _part(self, part: Any, queue: list[Any], at: str) -> dict[str, Any]:
        if isinstance(part, dict) and part.get("type") in PART_KEYS:
            refuse_unread(part, PART_KEYS[part["type"]], at)
            if part["type"] != "text" and part.get("text"):
                raise UsageError(f"{at}: an image part with text; write a part for each")
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
        raise UsageError(
            f"{at}: a content part of type {brief(repr(kind))}; write text or image parts"
        )

    def resolve(self, image: Any, where: str) -> str | StoredImage:
        """Resolve an image's path to a file inside the image folder; a data URI stays as it is.

        Raises:
            UsageError: It is no path, an address, outside of the folder, or missing.
        """
        if isinstance(image, StoredImage):
            return image
        if not isinstance(image, str) or not image:
            raise UsageError(
                f"{where}: an image that is no path ({brief(repr(image))}); write its path"
            )
        if is_data_uri(image):
            return image
        refuse_web(image, where)
        if self.images is not None:
            if image not in self.images:
                there = ", ".join(dict.fromkeys(map(str, self.images.values()))) or "none"
                raise BadImage(
                    f"{where}: no image {brief(image)} lies beside this record ({there}); put it "
                    "into the shard under the record's own name, or leave the row out",
                    "missing",
                )
            return self.images[image]
        if self.folder is None:
            raise UsageError(
                f"{where}: the image is a path ({brief(image)}); give the folder that paths start "
                "from (images: in the recipe, --images)"
            )
        path = os.path.normpath(os.path.join(self.folder, path_of(image)))
        if os.path.commonpath([self.folder, path]) != self.folder:
            raise BadImage(
                f"{where}: the image {brief(image)} lies outside of the image folder "
                f"{self.folder}; set the image folder to one that holds it",
                "outside",
            )
        if self.check_images and not os.path.isfile(path):
            raise BadImage(
                f"{where}: image file not found: {brief(path)}; {_where_it_may_be(image)}",
                "missing",
            )
        return path


def id_of(data: dict[str, Any]) -> str | None:
    """Return what a record calls itself, as it can be written anywhere, or None."""
    found = data.get("id")
    return None if found is None else brief(found)


def _check_text(data: dict[str, Any], where: str) -> None:
    """Refuse what JSON can write and what reads a row cannot: half characters, endless nesting."""
    left: list[tuple[Any, int]] = [(data, 0)]
    while left:
        value, depth = left.pop()
        if isinstance(value, str):
            try:
                if not value.isascii():
                    value.encode()
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"{where}: half a character ({value[error.start]!a}) in its text; write "
                    "the whole one, or leave it out"
                ) from None
        elif isinstance(value, dict | list):
            if depth == _DEEPEST:
                raise UsageError(f"{where}: more than {_DEEPEST} lists in lists; write a row")
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            left += [(one, depth + 1) for one in inner]


def _where_it_may_be(image: str) -> str:
    if len(image) > _LONGEST_NAME:
        return "an image's own bytes begin with data:image/png;base64, (or jpeg)"
    return "set the folder that image paths start from, or leave the row out"


def _listed(data: dict[str, Any], where: str) -> list[Any]:
    """Return the images beside the turns: one path, a list of them, or none."""
    listed: list[Any] = []
    for key in ("image", "images"):
        value = data.get(key)
        if isinstance(value, list):
            listed += value
        elif value is not None and value != "":
            listed.append(value)
    if any(not isinstance(image, str | StoredImage) for image in listed):
        raise UsageError(f"{where}: the images beside the turns are not paths; write paths")
    return listed
