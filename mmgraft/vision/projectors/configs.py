"""Settings of the projectors: pydantic, importable without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from mmgraft.strict import StrictModel
from mmgraft.vision.plan import Plan


class ProjectorConfig(StrictModel):
    """Settings of every projector.

    Attributes:
        kind: Name of the projector.
    """

    model_config = ConfigDict(frozen=True)

    kind: Any

    def counts(self, plan: Plan) -> int:
        """Positions of an image that a tower plans so; by default one for each of its vectors."""
        return plan.entries


class MlpConfig(ProjectorConfig):
    """Settings of ``mlp``: two linear layers with a GELU between, LLaVA's ``mlp2x_gelu``.

    Attributes:
        kind: Not written: settings without a kind are an ``mlp``'s.
        norm: A LayerNorm over the tower's features before the first linear layer. The published
            projectors have none.
        hidden: Width between the two linear layers; None means the width of the base.
        init_scale: Factor on the initial weights and bias of the last linear layer; below 1 the
            first image tokens are closer in size to the base's text embeddings.
    """

    kind: Literal["mlp"] = Field(default="mlp", exclude=True)
    norm: bool = False
    hidden: int | None = Field(default=None, ge=1)
    init_scale: float = Field(default=1.0, gt=0.0)


class LinearConfig(ProjectorConfig):
    """Settings of ``linear``: one linear layer.

    Attributes:
        norm: A LayerNorm over the tower's features before it.
        init_scale: Factor on its initial weights and bias.
    """

    kind: Literal["linear"] = "linear"
    norm: bool = False
    init_scale: float = Field(default=1.0, gt=0.0)


class _Blocks(ProjectorConfig):
    """Settings of projectors that make one vector of every ``k`` x ``k`` vectors of a view.

    Attributes:
        k: Side of a block. Blocks at the lower and right edge may be smaller.
        norm: A LayerNorm over the compressed features before the first linear layer.
        hidden: Width between the two linear layers; None means the width of the base.
        init_scale: Factor on the initial weights and bias of the last linear layer.
    """

    k: int = Field(default=2, ge=1)
    norm: bool = False
    hidden: int | None = Field(default=None, ge=1)
    init_scale: float = Field(default=1.0, gt=0.0)

    def counts(self, plan: Plan) -> int:
        """Blocks of all views."""
        return sum(-(-view.grid[0] // self.k) * -(-view.grid[1] // self.k) for view in plan.views)


class PixelShuffleConfig(_Blocks):
    """Settings of ``pixel_shuffle``: the vectors of a block side by side, then an ``mlp``."""

    kind: Literal["pixel_shuffle"] = "pixel_shuffle"
    norm: bool = True


class PoolConfig(_Blocks):
    """Settings of ``pool``: the mean of a block's vectors, then an ``mlp``."""

    kind: Literal["pool"] = "pool"
