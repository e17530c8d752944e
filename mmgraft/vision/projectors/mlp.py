"""``mlp``: two linear layers that carry image features into the base's embedding space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from mmgraft.vision.plan import Plan
from mmgraft.vision.projectors.base import Projector, draw_anew


class MlpProjector(Projector):
    """``Linear -> exact GELU -> Linear``, LLaVA's ``mlp2x_gelu``, with an optional norm before it.

    Parameters are ``mlp.0.*`` and ``mlp.2.*`` (the published key endings) and, with a norm,
    ``norm.*``. Linear layers start as torch starts them.
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
        self.reset_parameters()

    def width_in(self, in_features: int) -> int:
        """Return the width of what the first linear layer takes."""
        return in_features

    def reset_parameters(self) -> None:
        """Draw the parameters anew, the last layer scaled by ``config.init_scale``."""
        draw_anew([self.norm, *self.mlp], self.config.init_scale)

    def forward(self, features: Tensor, plans: Sequence[Plan]) -> Tensor:
        first = cast(nn.Linear, self.mlp[0])
        return self.mlp(self.norm(self.compress(features.to(first.weight.dtype), plans)))

    def compress(self, features: Tensor, plans: Sequence[Plan]) -> Tensor:
        """Make fewer vectors of the features; here all of them stay."""
        return features
