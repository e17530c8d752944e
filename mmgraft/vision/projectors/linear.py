"""``linear``: one linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mmgraft.vision.plan import Plan
from mmgraft.vision.projectors.base import Projector, draw_anew


class LinearProjector(Projector):
    """One linear layer, with an optional norm before it."""

    any_shape = True

    def __init__(self, config: Any, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features)
        self.norm = nn.LayerNorm(in_features) if config.norm else nn.Identity()
        self.linear = nn.Linear(in_features, out_features)
        draw_anew([self.norm, self.linear], config.init_scale)

    def forward(self, features: Tensor, plans: Sequence[Plan]) -> Tensor:
        return self.linear(self.norm(features.to(self.linear.weight.dtype)))
