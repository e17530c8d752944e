"""Settings of an IAA graft."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from mmgraft.strict import LayerChoice, StrictModel


class IAAConfig(StrictModel):
    """Which base layers are followed by an inserted layer, and what else the workflow owns.

    Source: Inner-Adaptor Architecture, arXiv 2408.12902. Structure `c` is the paper's final one;
    `a` and `b` are our reconstruction of what the paper says about them in prose.
    """

    method: Literal["iaa"] = "iaa"
    layers: LayerChoice = Field(
        description="base layers, counted from 0, after which a layer is inserted: "
        "[22, 24], '0-31:5', 'last:8'"
    )
    structure: Literal["a", "b", "c"] = Field(
        "c",
        description="c: a deeper decoder; b: gated, zero at the start; "
        "a: gated, and the layers also feed each other",
    )
    gate: Literal["linear", "scalar"] = Field(
        "linear", description="the zero-initialised gate of structures a and b; c has none"
    )
    embedding: bool = Field(True, description="own input embedding, copied from the base")
    norm: bool = Field(True, description="own final norm, copied from the base")
    head: bool = Field(True, description="own LM head, copied from the base")
    untie: bool = Field(
        False,
        description="where the base ties embedding and head: two copies instead of one tied copy",
    )

    @model_validator(mode="after")
    def _check_untie(self) -> Self:
        if self.untie and not (self.embedding and self.head):
            missing = "embedding" if not self.embedding else "head"
            raise ValueError(
                f"untie makes two copies of the tied embedding and head, but {missing} is false, "
                f"so there is only one; set {missing}: true or untie: false"
            )
        return self
