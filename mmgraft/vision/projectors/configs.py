"""Settings of the projectors: pydantic, importable without torch."""

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import Self

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

    def settled(self) -> Self:
        """Return the settings with nothing left to a default that depends on others."""
        return self


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


class _Resampled(ProjectorConfig):
    """Settings of projectors that make one number of vectors of each view, or of each image.

    Attributes:
        per: What that number is of. All views of an image are read together with ``image``.
        layers: Number of layers.
        heads: Query heads of an attention.
        init_scale: Factor on the initial parameters of the last module.
    """

    _number: ClassVar[str]
    per: Literal["image", "view"] | None = None
    layers: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    init_scale: float = Field(default=1.0, gt=0.0)

    def counts(self, plan: Plan) -> int:
        """Vectors of each view, or of the image."""
        settled = self.settled()
        times = len(plan.views) if settled.per == "view" else 1
        return times * getattr(settled, self._number)


_FORMS: dict[str, dict[str, Any]] = {
    "flamingo": {"per": "image", "layers": 6, "heads": 8, "head_dim": 64},
    "idefics2": {"per": "view", "layers": 3, "heads": 16, "head_dim": 96, "kv_heads": 4},
}


class PerceiverConfig(_Resampled):
    """Settings of ``perceiver``: learned latents attend to the features and to one another.

    What is None is the form's own.

    Attributes:
        form: ``flamingo`` (LayerNorms, GELU, at the tower's width) or ``idefics2`` (a gated
            projection to the base's width first, RMSNorms, grouped heads, gated feed-forwards).
        latents: Vectors that come out.
        head_dim: Width of a head.
        kv_heads: Heads of keys and values; None means as many as of queries.
        hidden: Width inside the projection of ``idefics2``; None means four times the base's.
    """

    _number: ClassVar[str] = "latents"
    kind: Literal["perceiver"] = "perceiver"
    form: Literal["flamingo", "idefics2"] = "flamingo"
    latents: int = Field(default=64, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    hidden: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        one = self.settled()
        if one.heads % (one.kv_heads or one.heads):
            raise ValueError(
                f"{one.kv_heads} kv_heads do not divide {one.heads} heads; set kv_heads as well"
            )
        if self.hidden is not None and self.form == "flamingo":
            raise ValueError("hidden is of form idefics2; leave it out, or set form: idefics2")
        return self

    def settled(self) -> Any:
        given = self.model_dump(exclude_none=True)
        return self.model_copy(update={**_FORMS[self.form], **given})


class QFormerConfig(_Resampled):
    """Settings of ``qformer``: learned queries in BERT layers, some of which read the features.

    What is None is BLIP-2's own or, with ``weights``, what their config says.

    Attributes:
        weights: Folder or Hub id of a BLIP-2 checkpoint whose Q-Former it starts as.
        revision: Hub commit, branch or tag of the checkpoint.
        queries: Vectors that come out of an image or view.
        width: Of the queries.
        hidden: Width of a feed-forward.
        every: Each so many layers one reads the features, the first one among them.
        act: Activation of a feed-forward.
        eps: Of the norms, and ``norm_eps`` of that of the features.
        features: Width of the features that the published weights read; filled in from them.
    """

    _number: ClassVar[str] = "queries"
    kind: Literal["qformer"] = "qformer"
    per: Literal["image", "view"] = "view"  # pyright: ignore[reportIncompatibleVariableOverride]
    weights: str | None = None
    revision: str | None = None
    queries: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    hidden: int | None = Field(default=None, ge=1)
    every: int | None = Field(default=None, ge=1)
    act: Literal["gelu", "relu", "silu"] | None = None
    eps: float | None = Field(default=None, gt=0.0)
    norm_eps: float | None = Field(default=None, gt=0.0)
    features: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        given = [name for name, value in self._sizes().items() if value is not None]
        if self.weights is not None and self.features is None and given:
            raise ValueError(f"{', '.join(given)}: read from the weights; leave them out")
        width, heads = self.width or 768, self.heads or 12
        if width % heads:
            raise ValueError(f"{heads} heads do not divide width {width}")
        return self

    def _sizes(self) -> dict[str, Any]:
        return self.model_dump(exclude=_NO_SIZES)

    def settled(self) -> Any:
        if None not in self._sizes().values():
            return self
        from mmgraft.vision.projectors.qformer import published

        given = self.model_dump(exclude_none=True, exclude={"weights", "revision"})
        found = published(self.weights, self.revision)
        return self.parse({**found, **given}, f"settings of the Q-Former {self.weights}")


_NO_SIZES = {"kind", "weights", "revision", "per", "init_scale", "features"}
