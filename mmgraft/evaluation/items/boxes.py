"""The box of a record."""

from __future__ import annotations

from typing import Any

from mmgraft.errors import UsageError
from mmgraft.evaluation.items.item import Box


def box_of(value: Any, size: tuple[int, int], where: str) -> Box:
    """Return a box ``(x1, y1, x2, y2)`` in pixels, checked against its image.

    Args:
        value: Four numbers.
        size: ``(width, height)`` of the image; a box may pass its edge by a rounding pixel.
        where: Names the row in errors.

    Raises:
        UsageError: Not four numbers, not in order, or outside of the image.
    """
    numbers = value if isinstance(value, list | tuple) else []
    if len(numbers) != 4 or any(
        isinstance(one, bool) or not isinstance(one, int | float) for one in numbers
    ):
        raise UsageError(f"{where}: a box {value!r}; write [x1, y1, x2, y2] in pixels")
    x1, y1, x2, y2 = map(float, numbers)
    if not (x1 < x2 and y1 < y2):
        raise UsageError(
            f"{where}: the box {list(numbers)} has no area; write [x1, y1, x2, y2], the corner at "
            "the top left before that at the bottom right"
        )
    width, height = size
    if x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1:
        raise UsageError(
            f"{where}: the box {list(numbers)} leaves its image of {width} x {height} pixels; "
            "write [x1, y1, x2, y2] in pixels, not [x, y, width, height]"
        )
    return x1, y1, x2, y2
