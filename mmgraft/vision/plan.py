"""The plan of a tower for an image of one size: its views, and the grid of vectors of each."""

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Literal

from typing_extensions import Self

from mmgraft.frozen import Frozen

#: Width and height of an image in pixels, as it is shown (turned as its EXIF data says).
Size = tuple[int, int]

#: Rows and columns.
Grid = tuple[int, int]


class View(Frozen):
    """One look of a tower at an image: the whole of it, or a part.

    Attributes:
        kind: ``base`` and ``thumbnail`` show the whole image, ``tile`` a part, ``frame`` one image
            of a video.
        grid: Rows and columns of feature vectors, which come row by row.
        at: Row and column of a tile among the tiles.
        valid: Rows and columns of the grid that are no padding; None means all.
    """

    kind: Literal["base", "tile", "thumbnail", "frame"]
    grid: Grid
    at: Grid = (0, 0)
    valid: Grid | None = None


class Plan(Frozen):
    """The views of one image in order, a function of its size alone.

    Attributes:
        views: At least one.
        layout: Rows and columns of tiles.
    """

    views: tuple[View, ...]
    layout: Grid = (1, 1)

    @classmethod
    def single(cls, grid: Grid) -> Self:
        """Return the plan of one view of the whole image."""
        return cls((View("base", grid),))

    @classmethod
    def of_count(cls, vectors: int) -> Self:
        """One view of so many vectors: a square where that fits, else one row."""
        side = math.isqrt(vectors)
        return cls.single((side, side) if side * side == vectors else (1, vectors))

    @property
    def entries(self) -> int:
        """Feature vectors of all views."""
        return sum(view.grid[0] * view.grid[1] for view in self.views)


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
    def same(cls, number: int) -> "ImagePositions":
        """Return positions of which every image takes the same number."""
        return cls(attrgetter("entries"), Plan.single((1, number)))

    def __call__(self, size: Size) -> int:
        """Positions of an image of one size (width, height)."""
        if isinstance(self.plan, Plan):
            return self.counts(self.plan)
        return self.counts(self.plan(size))
