"""Put the images listed beside turns in their places: at a part, at a word, or first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

from mmgraft.data.chat.content import image_of, is_image
from mmgraft.data.chat.turns import role_of
from mmgraft.errors import UsageError

WORD = "<image>"
"""Placeholder of an image in the texts of most layouts; beside content parts it is plain text."""

Words = Literal["never", "always", "first", "parts", "listed"]
"""Rule by which ``WORD`` is an image. ``first``: always, and images without any word come before
the first turn of a user; ``parts``: never where any part is an image, else ``first`` where images
are listed; ``listed``: as ``parts``, but what may be either is refused."""

Turn = dict[str, Any]


def place_images(
    turns: Sequence[Turn], images: Sequence[Any], words: Words, where: str
) -> tuple[list[Turn], str]:
    """Put images where a row says that they stand.

    Args:
        turns: Role and content, a text or parts; a part ``{"type": "image"}`` takes an image.
        images: In their order.
        words: How words are read.
        where: Names the row in errors.

    Returns:
        New turns, and by what the images were placed: ``parts``, ``words``, or ``first``.

    Raises:
        UsageError: There are more or fewer places than images, or it is not clear which they are.
    """
    count = len(images)
    shown = [image_of(part) for turn in turns for part in _parts(turn) if is_image(part)]
    bare = shown.count(None)
    if not count and not bare and words not in ("always", "first"):
        return list(turns), "parts"
    split = [_split(turn, not shown) for turn in turns]
    said = sum(map(_is_bare, chain(*map(_parts, split)))) - bare
    if words == "listed" and said and shown and count in (said, said + bare):
        raise UsageError(
            f"{where}: {count} images are listed, {bare} parts may take one, and {WORD} occurs "
            f"{said} times; write format: messages in the recipe, where {WORD} is a text, or "
            "format: swift, where it is an image"
        )
    if words in ("listed", "parts"):
        words = "first" if count and not shown else "never"
    if words == "never" and bare >= count:
        return _filled(turns, images), "parts"
    if words == "first" and count and not said and not shown:
        return _filled(_with_first(turns, count, where), images), "first"
    if count != bare + (said if words != "never" else 0):
        takes = f"{bare} parts take one" if words == "never" else f"{WORD} occurs {said} times"
        raise UsageError(
            f"{where}: {count} images are listed, but {takes}; write one for each image, as "
            f'{{"type": "image"}} in messages, where {WORD} is a text, else as {WORD}'
        )
    return _filled(split, images), "words" if said else "parts"


def _parts(turn: Turn) -> list[Any]:
    content = turn.get("content")
    return content if isinstance(content, list) else []


def _is_bare(part: Any) -> bool:
    return is_image(part) and image_of(part) is None


def _split(turn: Turn, in_parts: bool) -> Turn:
    """Return a turn with a part for each word; in text parts only where none is an image."""
    content = turn.get("content")
    if isinstance(content, str) and WORD in content:
        texts: list[Any] = [{"type": "text", "text": content}]
    elif in_parts and isinstance(content, list):
        texts = content
    else:
        return turn
    made: list[Any] = []
    for part in texts:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or WORD not in text:
            made.append(part)
            continue
        for at, piece in enumerate(text.split(WORD)):
            made += [{"type": "image"}] if at else []
            made += [{"type": "text", "text": piece}] if piece else []
    return {**turn, "content": made}


def _with_first(turns: Sequence[Turn], count: int, where: str) -> list[Turn]:
    """Return turns with empty image parts before the first turn of a user."""
    for at, turn in enumerate(turns):
        if role_of(turn["role"], f"{where}, turn {at + 1}") == "user":
            said = turn.get("content") or []
            said = [{"type": "text", "text": said}] if isinstance(said, str) else said
            return [
                *turns[:at],
                {**turn, "content": [{"type": "image"}] * count + said},
                *turns[at + 1 :],
            ]
    raise UsageError(f"{where}: {count} images are listed, but no turn of a user shows one; add it")


def _filled(turns: Sequence[Turn], images: Sequence[Any]) -> list[Turn]:
    """Return turns in which each empty image part took the next image, as far as there are any."""
    queue = iter(images)
    filled = list(turns)
    for at, turn in enumerate(turns):
        if any(map(_is_bare, _parts(turn))):
            parts = [
                {"type": "image", "image": next(queue, None)} if _is_bare(part) else part
                for part in turn["content"]
            ]
            filled[at] = {**turn, "content": parts}
    return filled
