"""``pixel_shuffle``: neighbouring vectors side by side, so that an image takes fewer positions.

Source: InternVL's ``pixel_shuffle`` (``ps_version`` v2) and its projector.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from mmgraft.vision.plan import Plan
from mmgraft.vision.projectors.base import by_grid
from mmgraft.vision.projectors.mlp import MlpProjector


class PixelShuffleProjector(MlpProjector):
    """Every ``k`` x ``k`` block of a view as one vector, row by row; then norm and ``mlp``.

    A grid whose sides are no multiples of ``k`` is filled with zeros below and on the right.
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
