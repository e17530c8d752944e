"""The projectors that mmgraft brings, and the class that every projector implements.

Each has its settings in ``configs.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        self.config, self.in_features = config.settled(), in_features

    def fill(self) -> None:
        """Take the published weights that the settings name; called once, where it is made."""

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
    grids = [grid for own in views(features, plans) for grid in own]
    return alike(grids, lambda x: compress(x).flatten(1, 2))


def views(features: Tensor, plans: Sequence[Plan]) -> list[list[Tensor]]:
    """Return the views of each image, ``(rows, columns, width)``."""
    grids = [view.grid for plan in plans for view in plan.views]
    pieces = iter(features.flatten(0, -2).split([rows * columns for rows, columns in grids]))
    return [[next(pieces).unflatten(0, view.grid) for view in plan.views] for plan in plans]


def alike(pieces: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of batches to tensors, those of one shape together.

    Returns:
        What it made of each, one after another in the order of the tensors.
    """
    made: dict[int, Tensor] = {}
    for shape in dict.fromkeys(piece.shape for piece in pieces):
        at = [index for index, piece in enumerate(pieces) if piece.shape == shape]
        made.update(zip(at, function(torch.stack([pieces[n] for n in at])), strict=True))
    return torch.cat([made[index] for index in range(len(pieces))])


class Resampler(Projector):
    """A projector that makes one number of vectors of each view, or of each image.

    A subclass implements ``resample``. Vectors that are padding of a view are left out, and pieces
    of one length are run together, so that no mask is needed.
    """

    def forward(self, features: Tensor, plans: Sequence[Plan]) -> Tensor:
        pieces: list[Tensor] = []
        for plan, grids in zip(plans, views(features, plans), strict=True):
            valid = [view.valid or view.grid for view in plan.views]
            own = [x[:r, :c].flatten(0, 1) for x, (r, c) in zip(grids, valid, strict=True)]
            pieces += own if self.config.per == "view" else [torch.cat(own)]
        return alike(pieces, self.resample)

    @abstractmethod
    def resample(self, features: Tensor) -> Tensor:
        """Make ``(pieces, vectors, out_features)`` of ``(pieces, entries, in_features)``."""


class LinearProjector(Projector):
    """``linear``: one linear layer, with an optional norm before it."""

    any_shape = True

    def __init__(self, config: Any, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features)
        self.norm = nn.LayerNorm(in_features) if config.norm else nn.Identity()
        self.linear = nn.Linear(in_features, out_features)
        draw_anew([self.norm, self.linear], config.init_scale)

    def forward(self, features: Tensor, plans: Sequence[Plan]) -> Tensor:
        return self.linear(self.norm(features.to(self.linear.weight.dtype)))


class MlpProjector(Projector):
    """``mlp``: ``Linear -> exact GELU -> Linear``, LLaVA's ``mlp2x_gelu``, with an optional norm.

    Parameters are ``mlp.0.*`` and ``mlp.2.*`` (the published key endings) and, with a norm before
    them, ``norm.*``. Linear layers start as torch starts them.
    """

    any_shape = True

    def __init__(self, config: Any, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features)
        width = self.width_in(in_features)
        hidden = config.hidden or out_features
        self.norm = nn.LayerNorm(width) if config.norm else nn.Identity()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out_features)
        )
        draw_anew([self.norm, *self.mlp], config.init_scale)

    def width_in(self, in_features: int) -> int:
        """Return the width of what the first linear layer takes."""
        return in_features

    def forward(self, features: Tensor, plans: Sequence[Plan]) -> Tensor:
        first = cast(nn.Linear, self.mlp[0])
        return self.mlp(self.norm(self.compress(features.to(first.weight.dtype), plans)))

    def compress(self, features: Tensor, plans: Sequence[Plan]) -> Tensor:
        """Make fewer vectors of the features; here all of them stay."""
        return features


class PixelShuffleProjector(MlpProjector):
    """``pixel_shuffle``: ``k`` x ``k`` blocks of a view as one vector, row by row; then ``mlp``.

    A grid whose sides are no multiples of ``k`` is filled with zeros below and on the right.
    Source: InternVL's ``pixel_shuffle`` (``ps_version`` v2) and its projector.
    """

    def width_in(self, in_features: int) -> int:
        return in_features * self.config.k**2

    def compress(self, features: Tensor, plans: Sequence[Plan]) -> Tensor:
        return by_grid(features, plans, self._shuffle)

    def _shuffle(self, x: Tensor) -> Tensor:
        k, (rows, columns) = self.config.k, x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -columns % k, 0, -rows % k))
        x = x.unflatten(2, (-1, k)).unflatten(1, (-1, k))  # (n, rows, k, columns, k, width)
        return x.transpose(2, 3).flatten(3)


class PoolProjector(MlpProjector):
    """``pool``: the mean of every ``k`` x ``k`` block of a view; then ``mlp``.

    At the edge of a grid whose sides are no multiples of ``k`` the mean is of fewer vectors.
    """

    def compress(self, features: Tensor, plans: Sequence[Plan]) -> Tensor:
        return by_grid(features, plans, self._pool)

    def _pool(self, x: Tensor) -> Tensor:
        image = x.permute(0, 3, 1, 2)  # (n, width, rows, columns)
        pooled = F.avg_pool2d(image, self.config.k, ceil_mode=True, count_include_pad=False)
        return pooled.permute(0, 2, 3, 1)
