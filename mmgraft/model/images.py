"""The images of a batch: their features, and which positions of which rows they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmgraft.errors import UsageError
from mmgraft.vision.plan import Plan

Counts = Callable[[int, Plan], int]
"""Positions of an image in a row, by the row's workflow: the row's number, the image's plan."""


@dataclass
class Images:
    """Images in order of appearance, row after row.

    Attributes:
        features: The tower's, ``(sum of entries, width)``, image after image.
        plans: Of each image.
        rows: The row of each image.
        lengths: Positions of each image in its row; 0 for an image that only the graft sees.
        counts: Vectors that its row's projector makes of each image; filled by `check`.
    """

    features: Tensor
    plans: list[Plan]
    rows: list[int]
    lengths: list[int]
    counts: list[int] = field(default_factory=list)

    def choose(self, numbers: Sequence[int], rows: Sequence[int] | None = None) -> Images:
        """Take some of the images, perhaps in other rows."""
        pieces = self.features.split([plan.entries for plan in self.plans])
        return Images(
            torch.cat([pieces[n] for n in numbers]) if numbers else self.features[:0],
            [self.plans[n] for n in numbers],
            [self.rows[n] for n in numbers] if rows is None else list(rows),
            [self.lengths[n] for n in numbers],
            [self.counts[n] for n in numbers],
        )

    def of_row(self, row: int) -> list[int]:
        """Numbers of a row's images."""
        return [number for number, owner in enumerate(self.rows) if owner == row]

    def expand(self, rows: int, times: int) -> Images:
        """Repeat every row so many times, each followed by its repetitions."""
        copies = [(n, row * times + i) for row in range(rows) for i in range(times)
                  for n in self.of_row(row)]  # fmt: skip
        return self.choose([n for n, _ in copies], [row for _, row in copies])

    def within(self, whole: Tensor, step: Tensor) -> Images | None:
        """Those that stand in the last positions of their rows.

        Args:
            whole: Image positions ``(b, S)`` of the rows.
            step: Those of the last positions ``(b, s)``.
        """
        if not (step != 0).any():
            return None
        before = ((whole != 0).sum(dim=1) - (step != 0).sum(dim=1)).tolist()
        kept = []
        for row, gone in enumerate(before):
            start = 0
            for number in self.of_row(row):
                if start >= gone:
                    kept.append(number)
                start += self.lengths[number]
        return self.choose(kept)

    def check(self, positions: Sequence[int], counts: Counts) -> None:
        """Hold the images against the image positions of the rows.

        Args:
            positions: Image positions of each row.
            counts: What an image takes.

        Raises:
            UsageError: Names the row, the image and both numbers.
        """
        self.counts = [counts(row, plan) for row, plan in zip(self.rows, self.plans, strict=True)]
        for number, wanted in enumerate(self.counts):
            row, length = self.rows[number], self.lengths[number]
            if length not in (0, wanted):
                raise UsageError(
                    f"image {number} (row {row}) has {length} positions in its row, and its "
                    f"projector makes {wanted} vectors of it: make the batch with the processor of "
                    "this model."
                )
        for row, held in enumerate(positions):
            taken = sum(self.lengths[number] for number in self.of_row(row))
            if taken != held:
                raise UsageError(
                    f"row {row} has {held} image positions, and its {len(self.of_row(row))} images "
                    f"take {taken}: every image needs its own positions, made by the processor of "
                    "this model."
                )


@dataclass
class GivenImages:
    """What a caller of the forward or of ``generate`` gave of images."""

    pixels: Tensor | None = None
    features: Tensor | Images | None = None
    sizes: Tensor | None = None
    lengths: Tensor | None = None
    rows: Tensor | None = None

    @property
    def any(self) -> bool:
        """Whether an image was given."""
        images = self.features if self.pixels is None else self.pixels
        return bool(
            images.plans if isinstance(images, Images) else images is not None and len(images)
        )

    def refuse(self) -> None:
        """Refuse images where no row has a position for one: they would be left out unsaid.

        Raises:
            UsageError: An image was given.
        """
        if self.any:
            raise UsageError(
                "images were given, but no row has a position for one: pass mm_token_type_ids too "
                "(the processor makes both)."
            )


def place(plans: Sequence[Plan], positions: Sequence[int], counts: Counts) -> list[int]:
    """Find the row of each image from the image positions of the rows alone.

    Raises:
        UsageError: The images do not fill the positions; names the row, the image and both numbers.
    """
    rows: list[int] = []
    row, left = -1, 0
    for number, plan in enumerate(plans):
        while left == 0:
            row += 1
            if row == len(positions):
                raise UsageError(
                    f"{len(plans)} images do not fill {sum(positions)} image positions: no row has "
                    f"positions left for image {number}; every image of the batch needs its own."
                )
            left = positions[row]
        wanted = counts(row, plan)
        if wanted > left:
            raise UsageError(
                f"row {row} has {left} image positions left for image {number}, which takes "
                f"{wanted}: make mm_token_type_ids with the processor of this model."
            )
        left -= wanted
        rows.append(row)
    if left or sum(positions[row + 1 :]):
        raise UsageError(
            f"{len(plans)} images do not fill {sum(positions)} image positions: row "
            f"{row if left else row + 1} has positions without an image; every image position "
            "belongs to an image."
        )
    return rows
