"""The projector: two linear layers that carry image features into the base's embedding space."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mmgraft.vision.spec import ProjectorSpec


class Projector(nn.Module):
    """``Linear -> exact GELU -> Linear``, LLaVA's ``mlp2x_gelu``, with an optional norm before it.

    Parameters are ``mlp.0.*`` and ``mlp.2.*`` (the published key endings) and, with a norm,
    ``norm.*``. Linear layers start as torch starts them.

    Args:
        in_features: Width of the tower's features.
        out_features: Width of the base's embeddings.
        norm: LayerNorm over the features first.
        hidden: Width between the two layers; None means `out_features`.
        init_scale: Factor on the last layer's initial weight and bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        norm: bool = False,
        hidden: int | None = None,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        hidden = hidden or out_features
        self.spec = ProjectorSpec(norm=norm, hidden=hidden, init_scale=init_scale)
        self.norm = nn.LayerNorm(in_features) if norm else nn.Identity()
        self.mlp = nn.Sequential(
            nn.Linear(in_features, hidden), nn.GELU(), nn.Linear(hidden, out_features)
        )
        self.reset_parameters()

    @classmethod
    def from_spec(cls, in_features: int, out_features: int, spec: ProjectorSpec) -> Self:
        """A fresh projector of the shape that the spec names."""
        return cls(in_features, out_features, spec.norm, spec.hidden, spec.init_scale)

    def reset_parameters(self) -> None:
        """Draw the parameters anew, the last layer scaled by ``spec.init_scale``."""
        for module in (self.norm, *self.mlp):
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()
        last = cast(nn.Linear, self.mlp[2])
        with torch.no_grad():
            last.weight.mul_(self.spec.init_scale)
            last.bias.mul_(self.spec.init_scale)

    def forward(self, features: Tensor) -> Tensor:
        """Project features of any dtype: (..., in_features) -> (..., out_features)."""
        first = cast(nn.Linear, self.mlp[0])
        return self.mlp(self.norm(features.to(first.weight.dtype)))
