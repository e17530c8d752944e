"""How many positions of a row an image takes, known from its size alone."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from mmgraft.vision.plan import Plan, Size


class ImagePositions:
    """Positions that an image takes: what a projector makes of what a tower plans for its size.

    Args:
        counts: A projector's, or its config's: a plan to a number of positions.
        plan: A tower's: the plan of every image, or a function of an image's size.

    Attributes:
        fixed: The number where it is the same for every image; else None.
    """

    def __init__(self, counts: Callable[[Plan], int], plan: Plan | Callable[[Size], Plan]) -> None:
        self.counts, self.plan = counts, plan
        self.fixed = counts(plan) if isinstance(plan, Plan) else None

    @classmethod
    def same(cls, number: int) -> ImagePositions:
        """The same number for every image."""
        return cls(attrgetter("entries"), Plan.single((1, number)))

    def __call__(self, size: Size) -> int:
        """Positions of an image of one size (width, height)."""
        if isinstance(self.plan, Plan):
            return self.counts(self.plan)
        return self.counts(self.plan(size))
