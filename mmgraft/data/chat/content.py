"""The parts of a message: text and images, and how they become one text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmgraft.errors import UsageError

Message = Mapping[str, Any]
"""``{"role", "content": str | list of parts}``; other keys go to the chat template untouched."""


def is_image(part: Any) -> bool:
    """Tell whether a content part is an image, in any of the spellings in use."""
    # A dict first: to ask for a Mapping takes ten times as long, and there are millions of parts.
    return isinstance(part, dict | Mapping) and part.get("type") in ("image", "image_url")


def image_of(part: Mapping[str, Any]) -> Any:
    """Return what an image part holds: a path, a data URI or a PIL image; None for an empty part.

    Read are ``{"type": "image", "image": X}`` (or ``path``, ``url``) and
    ``{"type": "image_url", "image_url": {"url": X}}``.
    """
    for key in ("image", "image_url", "path", "url"):
        value = part.get(key)
        if isinstance(value, Mapping):
            value = value.get("url") or (value if value.get("bytes") or value.get("path") else None)
        if value is not None and value != "":
            return value
    return None


def has_image(messages: Iterable[Message]) -> bool:
    """Tell whether any message has an image part."""
    return any(True for _ in images_of_all(messages))


def images_of_all(messages: Iterable[Message]) -> Iterator[Any]:
    """Yield what the image parts of all messages hold, in order of appearance."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if is_image(part):
                yield image_of(part)


def answering(messages: Iterable[Message]) -> list[int]:
    """Return the turns in which the assistant says something, or calls a tool."""
    return [at for at, message in enumerate(messages) if _answers(message)]


def _answers(message: Message) -> bool:
    if message["role"] != "assistant":
        return False
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(str(part.get("text") or "") for part in content)
    return bool(str(content or "").strip() or message.get("tool_calls"))


def has_parts(messages: Iterable[Message]) -> bool:
    """Tell whether any message has a list of parts for its content."""
    return any(isinstance(message.get("content"), list | tuple) for message in messages)


def flatten(
    messages: Sequence[Message], sentinel: str, where: str = "the conversation"
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Write every list of parts as one text, each image as the sentinel.

    A newline is put between an image and the text part after it, unless that text begins with one;
    nothing else is added, so neighbouring texts are joined as they are. Content that is not a list
    is left alone.

    Returns:
        New messages, and what the image parts hold, in order of appearance.

    Raises:
        UsageError: For a part that is neither text nor image, and for an image part that holds
            nothing.
    """
    flat: list[dict[str, Any]] = []
    images: list[Any] = []
    for number, message in enumerate(messages, start=1):
        message = dict(message)
        if isinstance(message.get("content"), list | tuple):
            turn = f"{where}, turn {number}"
            message["content"] = _flatten_parts(message["content"], sentinel, images, turn)
        flat.append(message)
    return flat, images


def _flatten_parts(parts: Sequence[Any], sentinel: str, images: list[Any], turn: str) -> str:
    text, after_image = "", False
    for part in parts:
        if is_image(part):
            image = image_of(part)
            if image is None:
                raise UsageError(f'{turn}: an image part without an image; write "image": PATH')
            images.append(image)
            text += sentinel
            after_image = True
            continue
        piece = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(piece, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UsageError(f"{turn}: a content part of type {kind!r}; write text or image parts")
        if piece:
            text += "\n" + piece if after_image and piece[0] not in "\r\n" else piece
            after_image = False
    return text


def strings_in(value: Any) -> Iterator[str]:
    """Yield every text anywhere inside nested lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)
