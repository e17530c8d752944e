"""Settings of an IAA graft."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from mmgraft.grafts.method import PlainDecoder, Promises
from mmgraft.strict import LayerChoice, Option, StrictModel, about

GROUPS = {
    "layers": "inserted layers, and their gates",
    "embedding": "own input embedding",
    "norm": "own final norm",
    "head": "own LM head",
}

_GATED: Mapping[str, Literal["", "after", "beside"]] = {"a": "beside", "b": "after", "c": ""}


class IAAConfig(StrictModel):
    """Settings of the inserted layers, and of what else the workflow owns.

    Source: Inner-Adaptor Architecture, arXiv 2408.12902. Structure ``c`` is the paper's final one;
    ``a`` and ``b`` are our reconstruction of what the paper says about them in prose.
    """

    method: Literal["iaa"] = "iaa"
    layers: LayerChoice = Field(
        description="base layers, counted from 0, after which a layer is inserted: "
        "[22, 24], '0-31:5', 'last:8'"
    )
    structure: Annotated[Literal["a", "b", "c"], Option("Structure: a, b or c.")] = about(
        "c: a deeper decoder; b: gated, zero at the start; "
        "a: gated, and the layers also feed each other",
        "c",
    )
    gate: Annotated[
        Literal["linear", "scalar"], Option("Gate of structures a and b: linear or scalar.")
    ] = about("the zero-initialised gate of structures a and b; c has none", "linear")
    embedding: Annotated[bool, Option("Own input embedding.")] = about(
        "own input embedding, copied from the base", True
    )
    norm: Annotated[bool, Option("Own final norm.")] = about(
        "own final norm, copied from the base", True
    )
    head: Annotated[bool, Option("Own LM head.")] = about("own LM head, copied from the base", True)
    untie: Annotated[bool, Option("Two copies where the base ties embedding and head.")] = about(
        "two copies instead of one tied copy where the base ties embedding and head", False
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


def promises(config: IAAConfig) -> Promises:
    """Return what holds: a gate is needed for a fresh graft to change nothing."""
    no_gate = "structure c has no gate: it is a deeper decoder from the start"
    return Promises(
        before="inserted layers act on every position of a row with an image",
        fresh=no_gate if config.structure == "c" else "",
    )


def unused(config: IAAConfig) -> tuple[str, ...]:
    """Return the settings without a meaning: structure c has no gate."""
    return ("gate",) if config.structure == "c" else ()


def as_decoder(config: IAAConfig, active: bool) -> PlainDecoder:
    """Return the deeper decoder that structure c is, and the gated ones that b and a are."""
    if not active:
        return PlainDecoder()
    owns = frozenset(name for name in ("embedding", "norm", "head") if getattr(config, name))
    gated = _GATED[config.structure]
    return PlainDecoder(config.layers, owns, config.untie, gated=gated)


def part_of(tensor: str) -> str:
    """Return the part that a tensor is counted with."""
    part = tensor.split(".")[0]
    return "inserted layers" if part == "layers" else part
