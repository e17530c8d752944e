"""Choices of layers in text: ``22,24``, ``0-31:5``, ``every:4``, ``last:8``, ``all``.

Layers are counted from 0. Parts are joined by commas and may be mixed: ``0,5-9,last:2``.
"""

import re
from collections.abc import Sequence

from mmgraft.errors import UsageError

_FORMS = "write for example 22,24 or 0-31:5 or every:4 or last:8 or spread:8 or all"
_NUMBER = re.compile(r"\d+")
_RANGE = re.compile(r"(\d+)-(\d+)(?::(\d+))?")
_WORD = re.compile(r"(every|last|spread):(\d+)")

_MOST_LAYERS = 1 << 20  # a larger number is a slip of the keyboard; the limit bounds the work


def parse_layers(text: str | Sequence[int], num_layers: int) -> list[int]:
    """Return which base layers ``text`` names, as sorted indices.

    Of a base of 12 layers,

    - ``3,7`` means layers 3 and 7,
    - ``2-6`` 2, 3, 4, 5, 6: both ends count,
    - ``0-11:5`` every fifth from 0: 0, 5, 10,
    - ``every:4`` the last of every 4: 3, 7, 11,
    - ``last:2`` 10, 11,
    - ``spread:3`` the last but one of each of 3 parts: 2, 6, 10; fewer of a base with few layers,
    - ``all`` 0 to 11.

    Args:
        text: One of the forms, or indices already in a list.
        num_layers: Number of decoder layers of the base.

    Raises:
        UsageError: A layer that the base lacks, one named twice, or text in no known form.
    """
    if num_layers < 1:
        raise UsageError(f"the base has {num_layers} layers; it needs at least one")
    parts = _split(text)
    found: list[int] = []
    for part in parts:
        found.extend(_expand(part, num_layers))
    outside = [layer for layer in found if not 0 <= layer < num_layers]
    if outside:
        raise UsageError(
            f"layer {outside[0]} does not exist: the base has {num_layers} layers, "
            f"counted 0 to {num_layers - 1}; choose among those"
        )
    seen: set[int] = set()
    for layer in found:
        if layer in seen:
            raise UsageError(f"layer {layer} is named twice; name it once")
        seen.add(layer)
    return sorted(found)


def check_layers(text: str | Sequence[int]) -> None:
    """Check the form of ``text`` before the base, and so its number of layers, is known.

    Raises:
        UsageError: For text in no known form, or a layer that is plainly named twice.
    """
    plain = [int(part) for part in _split(text) if _NUMBER.fullmatch(part)]
    for layer in plain:
        if plain.count(layer) > 1:
            raise UsageError(f"layer {layer} is named twice; name it once")


def _split(text: str | Sequence[int]) -> list[str]:
    """Return the parts of ``text``, each in a known form."""
    if isinstance(text, str):
        parts = [part.strip().lower() for part in text.split(",")]
    else:
        for layer in text:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise UsageError(f"{layer!r} is not a layer: layers are numbers from 0; {_FORMS}")
        parts = [str(layer) for layer in text]
    if not parts or parts == [""]:
        raise UsageError(f"no layers are named; {_FORMS}")
    for part in parts:
        known = part == "all" or any(form.fullmatch(part) for form in (_NUMBER, _RANGE, _WORD))
        if not known or not part.isascii():
            raise UsageError(f"layers {text!r}: {part!r} is in no known form; {_FORMS}")
        if any(int(number) >= _MOST_LAYERS for number in _NUMBER.findall(part)):
            raise UsageError(f"layers {text!r}: {part!r} is larger than any model; {_FORMS}")
    return parts


def _expand(part: str, num_layers: int) -> list[int]:
    if part == "all":
        return list(range(num_layers))
    if word := _WORD.fullmatch(part):
        return _expand_word(word[1], int(word[2]), num_layers)
    if span := _RANGE.fullmatch(part):
        first, last, step = int(span[1]), int(span[2]), int(span[3] or 1)
        if first > last or step < 1:
            raise UsageError(
                f"layers {part!r}: the smaller layer comes first and the step is at least 1, "
                "as in 0-31:5"
            )
        return list(range(first, last + 1, step))
    return [int(part)]


def _expand_word(word: str, count: int, num_layers: int) -> list[int]:
    if word == "spread" and count:
        ends = (-(-number * num_layers // count) for number in range(1, count + 1))
        return sorted({max(0, end - 2) for end in ends})
    if not 1 <= count <= num_layers:
        raise UsageError(
            f"layers '{word}:{count}': the number must lie between 1 and the base's "
            f"{num_layers} layers"
        )
    if word == "last":
        return list(range(num_layers - count, num_layers))
    return list(range(count - 1, num_layers, count))
