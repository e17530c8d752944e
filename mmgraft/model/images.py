"""The images of a batch: their features, and which positions of which rows they take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmgraft.errors import UsageError
from mmgraft.vision.plan import Plan
from mmgraft.vision.projectors.built_in import Projector
from mmgraft.vision.towers.base import VisionTower

#: Positions of an image in a row, by the row's workflow: the row's number, the image's plan.
Counts = Callable[[int, Plan], int]


@dataclass
class Images:
    """Images in order of appearance, row after row.

    Attributes:
        features: The tower's, ``(sum of entries, width)``, image after image; as the tower gives
            them, ``(images, entries, width)``, where all have one plan.
        plans: Of each image.
        rows: The row of each image.
        lengths: Positions of each image in its row; 0 for an image that only the graft sees.
        counts: Vectors that its row's projector makes of each image; filled when they are checked.
    """

    features: Tensor
    plans: list[Plan]
    rows: list[int]
    lengths: list[int]
    counts: list[int] = field(default_factory=list)

    def choose(self, numbers: Sequence[int], rows: Sequence[int] | None = None) -> "Images":
        """Take some of the images, perhaps in other rows."""
        if self.features.dim() == 3 or not numbers:
            features = self.features[list(numbers)]
        else:
            pieces = self.features.split([plan.entries for plan in self.plans])
            features = torch.cat([pieces[n] for n in numbers])
        return Images(
            features,
            [self.plans[n] for n in numbers],
            [self.rows[n] for n in numbers] if rows is None else list(rows),
            [self.lengths[n] for n in numbers],
            [self.counts[n] for n in numbers],
        )

    def project(self, projector: Projector) -> Tensor:
        """Their vectors in a row of the base's width, ``(sum of counts, h)``."""
        features = self.features if projector.any_shape else self.features.flatten(0, -2)
        return projector(features, self.plans).flatten(0, -2)

    def of_row(self, row: int) -> list[int]:
        """Numbers of a row's images."""
        return [number for number, owner in enumerate(self.rows) if owner == row]

    def expand(self, rows: int, times: int) -> "Images":
        """Repeat every row so many times, each followed by its repetitions."""
        copies = [(n, row * times + i) for row in range(rows) for i in range(times)
                  for n in self.of_row(row)]  # fmt: skip
        return self.choose([n for n, _ in copies], [row for _, row in copies])

    def within(self, whole: Tensor, step: Tensor) -> "Images | None":
        """Return those that stand in the last positions of their rows.

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
        if self.rows != sorted(self.rows):
            raise UsageError(f"image_rows {self.rows}: give images row after row.")
        for number, (row, plan) in enumerate(zip(self.rows, self.plans, strict=True)):
            wanted, length = counts(row, plan), self.lengths[number]
            if length not in (0, wanted):
                raise UsageError(
                    f"image {number} (row {row}) has {length} positions in its row, and takes "
                    f"{wanted} with its workflow: make the batch with the processor of this model."
                )
        for row, held in enumerate(positions):
            taken = sum(self.lengths[number] for number in self.of_row(row))
            if taken != held:
                raise UsageError(
                    f"row {row} has {held} image positions, and its images {self.of_row(row)} take "
                    f"{taken}: every image needs its own positions, made by the processor of this "
                    "model."
                )


@dataclass
class GivenImages:
    """Images as a caller of the forward or of ``generate`` gave them.

    Attributes:
        pixel_values: Of the images of all rows, in order of appearance: ``(images, 3, H, W)`` where
            the tower has one plan for all images.
        image_features: ``(sum of entries, tower width)`` instead: the tower's output, also as
            ``(images, entries, tower width)``.
        image_sizes: ``(images, 2)``, width and height, where the tower's plan depends on them.
        image_lengths: ``(images,)``, positions of each image in its row; 0 for an image that only
            the graft sees.
        image_rows: ``(images,)``, the row of each image. Without the two the images fill the image
            positions in order.
    """

    pixel_values: Tensor | None = None
    image_features: Tensor | Images | None = None
    image_sizes: Tensor | None = None
    image_lengths: Tensor | None = None
    image_rows: Tensor | None = None

    @property
    def any(self) -> bool:
        """Return whether an image was given."""
        images = self.image_features if self.pixel_values is None else self.pixel_values
        return bool(
            images.plans if isinstance(images, Images) else images is not None and len(images)
        )

    def check(self, rows: int, width: int) -> None:
        """Hold what was given against itself and the batch, before a tower sees an image.

        Args:
            rows: In the batch.
            width: Of a feature vector.

        Raises:
            UsageError: A tensor is of another shape or type, or of another number of images or
                rows; names it.
        """
        if (self.image_rows is None) != (self.image_lengths is None):
            raise UsageError("image_rows and image_lengths go together: give both, or neither.")
        counts: dict[str, int] = {}
        for name, *inner in (("image_sizes", 2), ("image_rows",), ("image_lengths",)):
            given: Tensor | None = getattr(self, name)
            if given is None:
                continue
            wrong = given.dim() != 1 + len(inner) or [*given.shape[1:]] != inner
            if wrong or given.is_floating_point():
                shape = ", ".join(map(str, ("images", *inner)))
                raise UsageError(
                    f"{name} is {tuple(given.shape)} of {given.dtype}: give integers ({shape})."
                )
            counts[name] = len(given)
        if len(set(counts.values())) > 1:
            each = ", ".join(f"{name} is of {count}" for name, count in counts.items())
            raise UsageError(f"the images are not of one number: {each}.")
        named = [] if self.image_rows is None else self.image_rows.tolist()
        if out := [row for row in named if not 0 <= row < rows]:
            raise UsageError(f"image_rows names row {out[0]}: the batch has rows 0 to {rows - 1}.")
        features = self.image_features
        if isinstance(features, Tensor) and (
            features.dim() not in (2, 3) or features.shape[-1] != width
        ):
            raise UsageError(
                f"image_features are {tuple(features.shape)}: give (images, entries, {width}), or "
                f"(sum of entries, {width}), as this model's tower makes them."
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
    """Find the row of each image: images fill the image positions of the rows in order."""
    rows: list[int] = []
    row, left = 0, positions[0]
    for plan in plans:
        while left <= 0 and row + 1 < len(positions):
            row += 1
            left = positions[row]
        left -= counts(row, plan)
        rows.append(row)
    return rows


def plan_images(tower: VisionTower, images: int, sizes: Tensor | None) -> list[Plan]:
    """Plan some images, from their sizes where the tower looks at these.

    Raises:
        UsageError: Sizes are needed and not given.
    """
    if tower.fixed_plan is not None:
        return [tower.fixed_plan] * images
    if sizes is None:
        raise UsageError(
            f"{tower.spec.name} sees each image by its size: give image_sizes, which the processor "
            "of this model makes."
        )
    return [tower.plan((int(width), int(height))) for width, height in sizes.tolist()]


def plan_features(tower: VisionTower | None, features: Tensor, sizes: Tensor | None) -> list[Plan]:
    """Plan the images of features, ``(sum of entries, width)`` or ``(images, entries, width)``.

    Raises:
        UsageError: The features are not those of whole images.
    """
    vectors = features.shape[:-1].numel()
    if tower is None:
        if features.dim() != 3:
            raise UsageError(
                "a model without a tower takes image_features (images, entries, width)."
            )
        return [Plan.of_count(features.shape[1])] * len(features)
    each = tower.fixed_plan.entries if tower.fixed_plan is not None else 1
    plans = plan_images(tower, vectors // each, sizes)
    if sum(plan.entries for plan in plans) != vectors:
        raise UsageError(
            f"image_features hold {vectors} vectors, and {len(plans)} images of this tower have "
            f"{sum(plan.entries for plan in plans)}."
        )
    return plans
