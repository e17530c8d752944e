"""Boxes as a model writes them, and how well they fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil, floor

from mmgraft.errors import UsageError
from mmgraft.evaluation.items.item import Box
from mmgraft.evaluation.metrics.intervals import Measured
from mmgraft.recipes.evaluation_set import BoxFormat

THRESHOLD = 0.5
_STEPS: dict[BoxFormat, int] = {"unit": 100, "thousand": 999, "ten": 9}
_NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")


def format_box(box: Box, boxes: BoxFormat, size: tuple[int, int]) -> str:
    """Write a box as text, ``[x1,y1,x2,y2]``.

    ``unit`` writes shares of width and height with two decimals, as LLaVA's instruction data do;
    ``thousand`` whole numbers from 0 to 999, 999 being the far edge; ``ten`` the same from 0 to 9,
    one digit each, for models that learn no finer ones; ``pixel`` whole pixels. A box that rounding
    would leave without an area is widened to the nearest step on both sides.

    Args:
        box: ``(x1, y1, x2, y2)`` in pixels.
        boxes: The format.
        size: ``(width, height)`` of the image in pixels.

    Raises:
        UsageError: No part of the box that has an area lies in the image.
    """
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
    texts = (f"{number / 100:.2f}" if boxes == "unit" else str(number) for number in numbers)
    return f"[{','.join(texts)}]"


def parse_box(text: str, boxes: BoxFormat, size: tuple[int, int]) -> Box | None:
    """Read the first box that an answer names, in pixels and cut to the image.

    Numbers may have decimals in every format, and words may stand around the box.

    Args:
        text: An answer.
        boxes: The format it is to be in; see :func:`format_box`.
        size: ``(width, height)`` of the image in pixels.

    Returns:
        ``(x1, y1, x2, y2)``; None for a malformed answer: no four numbers in brackets, or corners
        that leave no area in the image (swapped ones, or numbers of another format).
    """
    found = _BOX.search(text)
    if found is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in found.groups())
    if boxes != "pixel":
        scale = 1.0 if boxes == "unit" else float(_STEPS[boxes])
        x1, x2 = x1 / scale * size[0], x2 / scale * size[0]
        y1, y2 = y1 / scale * size[1], y2 / scale * size[1]
    return _clipped((x1, y1, x2, y2), size)


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
