"""``pool``: the mean of neighbouring vectors, so that an image takes fewer positions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from mmgraft.vision.plan import Plan
from mmgraft.vision.projectors.base import by_grid
from mmgraft.vision.projectors.mlp import MlpProjector


class PoolProjector(MlpProjector):
    """The mean of every ``k`` x ``k`` block of a view; then norm and ``mlp``.

    At the edge of a grid whose sides are no multiples of ``k`` the mean is of fewer vectors.
    """

    def compress(self, features: Tensor, plans: Sequence[Plan]) -> Tensor:
        return by_grid(features, plans, self._pool)

    def _pool(self, x: Tensor) -> Tensor:
        image = x.permute(0, 3, 1, 2)  # (n, width, rows, columns)
        pooled = F.avg_pool2d(image, self.config.k, ceil_mode=True, count_include_pad=False)
        return pooled.permute(0, 2, 3, 1)
