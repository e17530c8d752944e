"""Boxes as a model writes them, and how well they fit."""

import re
from collections.abc import Sequence
from math import ceil, floor

from mmgraft.errors import UsageError
from mmgraft.evaluation.items.item import Box
from mmgraft.evaluation.metrics.intervals import Measured
from mmgraft.recipes.evaluation_set import BoxFormat

THRESHOLD = 0.5
_STEPS: dict[BoxFormat, int] = {"unit": 100, "thousand": 999, "ten": 9, "cogvlm": 999, "qwen": 999}
_NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
_FOUR, _TWO = (",".join([_NUMBER] * count) for count in (4, 2))
_BOX = re.compile(rf"\[{_FOUR}\]")
_COGVLM = re.compile(rf"(?:\[\[|;)(?={_FOUR}(?:;[^\[\]]*)?\]\])")
_QWEN = re.compile(rf"\({_TWO}\)\s*,\s*\({_TWO}\)")
_READ: dict[BoxFormat, re.Pattern[str]] = {"cogvlm": _COGVLM, "qwen": _QWEN}


def format_box(box: Box, boxes: BoxFormat, size: tuple[int, int]) -> str:
    """Write a box as text, ``[x1,y1,x2,y2]``; see :func:`format_boxes`."""
    return format_boxes([box], boxes, size)


def format_boxes(
    found: Sequence[Box], boxes: BoxFormat, size: tuple[int, int], phrase: str = ""
) -> str:
    """Write boxes as text, ``phrase [x1,y1,x2,y2] [x1,y1,x2,y2]``.

    ``unit`` writes shares of width and height with two decimals, as LLaVA's instruction data do;
    ``thousand`` whole numbers from 0 to 999, 999 being the far edge; ``ten`` the same from 0 to 9,
    one digit each, for models that learn no finer ones; ``pixel`` whole pixels. ``cogvlm`` writes
    ``phrase [[x1,y1,x2,y2;x1,y1,x2,y2]]`` with three digits each, from 000 to 999, and ``qwen``
    ``<ref>phrase</ref><box>(x1,y1),(x2,y2)</box>``, a ``<box>`` each, from 0 to 999. A box that
    rounding would leave without an area is widened to the nearest step on both sides.

    Args:
        found: ``(x1, y1, x2, y2)`` in pixels, each.
        boxes: The format.
        size: ``(width, height)`` of the image in pixels.
        phrase: What the boxes are of; empty for none.

    Raises:
        UsageError: No part of a box that has an area lies in the image.
    """
    numbers = [_steps(box, boxes, size) for box in found]
    if boxes == "qwen":
        named = f"<ref>{phrase}</ref>" if phrase else ""
        return named + "".join(f"<box>({a},{b}),({c},{d})</box>" for a, b, c, d in numbers)
    form = {"unit": "{:.2f}", "cogvlm": "{:03d}"}.get(boxes, "{}")
    unit = 100 if boxes == "unit" else 1
    texts = [",".join(form.format(n / unit if unit > 1 else n) for n in box) for box in numbers]
    written = f"[[{';'.join(texts)}]]" if boxes == "cogvlm" else " ".join(f"[{t}]" for t in texts)
    return f"{phrase} {written}" if phrase else written


def _steps(box: Box, boxes: BoxFormat, size: tuple[int, int]) -> list[int]:
    """Return a box in whole steps of a format."""
    inside = _clipped(box, size)
    if inside is None:
        raise UsageError(
            f"box {list(box)} has no area in an image of {size[0]} x {size[1]} pixels; give "
            "x1 < x2 and y1 < y2 in pixels of the image"
        )
    numbers = [0, 0, 0, 0]
    for axis in (0, 1):
        steps = _STEPS.get(boxes, size[axis])
        low, high = (inside[at] / size[axis] * steps for at in (axis, axis + 2))
        first, last = round(low), round(high)
        if first == last:
            first, last = floor(low), ceil(high)
        numbers[axis], numbers[axis + 2] = first, last
    return numbers


def parse_box(text: str, boxes: BoxFormat, size: tuple[int, int]) -> Box | None:
    """Read the first box that an answer names, in pixels and cut to the image.

    Numbers may have decimals in every format, and words may stand around the box.

    Args:
        text: An answer.
        boxes: The format it is to be in; see :func:`format_boxes`.
        size: ``(width, height)`` of the image in pixels.

    Returns:
        ``(x1, y1, x2, y2)``; None for a malformed answer: no four numbers in brackets, or corners
        that leave no area in the image (swapped ones, or numbers of another format).
    """
    return next(iter(parse_boxes(text, boxes, size)), None)


def parse_boxes(text: str, boxes: BoxFormat, size: tuple[int, int]) -> list[Box | None]:
    """Read all boxes that an answer names, as :func:`parse_box` does each.

    Of ``qwen`` the corners are read, whether or not ``<box>`` was dropped with the special tokens.
    """
    found: list[Box | None] = []
    scales = size if boxes == "pixel" else (1.0,) * 2 if boxes == "unit" else (_STEPS[boxes],) * 2
    for match in _READ.get(boxes, _BOX).finditer(text):
        corners = [float(number) for number in match.groups()]
        x1, y1, x2, y2 = (
            number / scales[at % 2] * size[at % 2] for at, number in enumerate(corners)
        )
        found.append(_clipped((x1, y1, x2, y2), size))
    return found


def iou(one: Box, other: Box) -> float:
    """Compute the intersection over union of two boxes with an area, 0 to 1.

    Source: the Jaccard index of Everingham et al. 2010 (PASCAL VOC), of continuous coordinates:
    no pixel is added to widths and heights.
    """
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (_area(one) + _area(other) - shared)


def measure_boxes(
    given: Sequence[str], truth: Sequence[Box], sizes: Sequence[tuple[int, int]], boxes: BoxFormat
) -> Measured:
    """Measure precision at IoU 0.5, mean IoU, and the share of malformed answers (IoU 0).

    An answer is right where the IoU is 0.5 or more, as referring expressions (RefCOCO; Yu et al.
    2016, arXiv 1608.00272) are scored.

    Args:
        given: Answers of a model.
        truth: Right boxes in pixels.
        sizes: ``(width, height)`` of each image in pixels.
        boxes: The format of the answers.
    """
    overlaps, malformed = [], []
    for answer, right, size in zip(given, truth, sizes, strict=True):
        box = parse_box(answer, boxes, size)
        malformed.append(box is None)
        overlaps.append(0.0 if box is None else iou(box, right))
    right_ones = [overlap >= THRESHOLD for overlap in overlaps]
    return Measured.means(
        **{f"precision_at_{THRESHOLD}": right_ones, "mean_iou": overlaps, "malformed": malformed}
    )


def _clipped(box: Box, size: tuple[int, int]) -> Box | None:
    x1, x2 = (min(max(value, 0.0), float(size[0])) for value in (box[0], box[2]))
    y1, y2 = (min(max(value, 0.0), float(size[1])) for value in (box[1], box[3]))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
