"""The class that every projector implements, and what most of them need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmgraft.vision.plan import Plan


class Projector(nn.Module, ABC):
    """From a tower's features to vectors of the base's embedding width.

    A subclass makes its modules from its settings, implements ``forward``, and has settings whose
    ``counts`` tells the number of its vectors from a plan alone.

    Attributes:
        config: Its settings.
        in_features: Width of the tower's features.
        any_shape: Features may also come as a tower gives them where all images have one plan,
            ``(images, entries, in_features)``, which spares a copy.
    """

    config: Any
    in_features: int
    any_shape: ClassVar[bool] = False

    def __init__(self, config: Any, in_features: int) -> None:
        super().__init__()
        self.config, self.in_features = config, in_features

    @abstractmethod
    def forward(self, features: Tensor, plans: Sequence[Plan]) -> Tensor:
        """Project the features of some images.

        Args:
            features: ``(sum of entries, in_features)`` of any dtype, image after image.
            plans: One an image.

        Returns:
            ``(sum of counts, out_features)``, image after image.
        """

    def counts(self, plan: Plan) -> int:
        """Return how many vectors it makes of one image."""
        return self.config.counts(plan)


@torch.no_grad()
def draw_anew(modules: Sequence[nn.Module], init_scale: float) -> None:
    """Draw parameters as torch starts them, those of the last module scaled."""
    for module in modules:
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
    for parameter in modules[-1].parameters():
        parameter.mul_(init_scale)


def by_grid(
    features: Tensor, plans: Sequence[Plan], compress: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a function of grids to every view, views of one grid together.

    Args:
        features: ``(sum of entries, width)``.
        plans: One an image.
        compress: ``(views, rows, columns, width)`` to as many grids of another size.

    Returns:
        The vectors of all grids row by row, in the order of the views.
    """
    features = features.flatten(0, -2)
    grids = [view.grid for plan in plans for view in plan.views]
    if len(set(grids)) == 1:
        return compress(features.unflatten(0, (len(grids), *grids[0]))).flatten(0, 2)
    pieces = features.split([rows * columns for rows, columns in grids])
    made: dict[int, Tensor] = {}
    for grid in dict.fromkeys(grids):
        at = [index for index, other in enumerate(grids) if other == grid]
        alike = torch.stack([pieces[index].unflatten(0, grid) for index in at])
        made.update(zip(at, compress(alike).flatten(1, 2), strict=True))
    return torch.cat([made[index] for index in range(len(grids))])
