"""Settings of a visual expert."""

from typing import Annotated, Literal

from mmgraft.errors import UsageError
from mmgraft.grafts.method import PlainDecoder, Promises
from mmgraft.strict import LayerChoice, Option, StrictModel, about

GROUPS = {
    "attention": "weights for image positions in the attention's linear layers",
    "feedforward": "weights for image positions in the feed-forward's linear layers",
}


class ExpertConfig(StrictModel):
    """Settings of the experts: linear layers of the base, rank, and positions of an image.

    Source: CogVLM, arXiv 2311.03079.
    """

    method: Literal["expert"] = "expert"
    layers: LayerChoice = about(
        "base layers, counted from 0, with experts: 'all', [0, 4], 'every:4'", "all"
    )
    parts: Annotated[
        list[Literal["attention", "feedforward"]],
        Option("Parts of a layer with experts: attention, feedforward or both."),
    ] = about(
        "whose linear layers have an expert; of a mixture of experts, attention and shared experts",
        ["attention", "feedforward"],
        min_length=1,
    )
    rank: Annotated[
        int | None, Option("Rank of what is added to the weights; whole copies when not given.")
    ] = about("an expert is W + B A of this rank; None: a copy of the base's W", ge=1)
    image_positions: Annotated[
        Literal["each", "shared"], Option("Positions of an image: each or shared.")
    ] = about(
        "each: every vector of an image has a position of its own; shared: all of an "
        "image have the same (CogVLM)",
        "each",
    )


def promises(config: ExpertConfig) -> Promises:
    """Return what holds: a copy gives what its original does, but for rounding."""
    fresh = packing = ""
    if config.rank is None:
        fresh = "copies multiply image positions by themselves, which rounds otherwise (1e-5)"
    if config.image_positions == "shared":
        fresh = "an image takes one position, where a projector alone gives it many"
        packing = "positions that an image shares are read as the beginnings of rows"
    return Promises(before="", fresh=fresh, packing=packing)


def as_decoder(config: ExpertConfig, active: bool) -> PlainDecoder:
    """Refuse: an ordinary decoder has one set of weights."""
    if not active:
        return PlainDecoder()
    raise UsageError(
        "an expert's weights act at image positions and the base's at all others; an ordinary "
        "decoder has one set of weights for both"
    )
