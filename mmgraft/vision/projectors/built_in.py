"""The projectors that mmgraft brings; each has its settings in ``configs.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from mmgraft.vision.plan import Plan
from mmgraft.vision.projectors.base import Projector, by_grid, draw_anew


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
