"""Settings of a Wings graft."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import field_validator

from mmgraft.errors import UsageError
from mmgraft.grafts.method import PlainDecoder, StageSwitches
from mmgraft.strict import LayerChoice, Option, StrictModel, about

if TYPE_CHECKING:
    from mmgraft.anatomy import Anatomy

LearnerName = Literal["visual", "textual"]

GROUPS = {
    "learners": "both learners",
    "learners.visual": "visual learners",
    "learners.textual": "textual learners",
    "router": "routers",
}


class WingsConfig(StrictModel):
    """Settings of the learners: base layers, kind, size, and the weights of their outputs.

    Source: Wings, arXiv 2406.03496.
    """

    method: Literal["wings"] = "wings"
    layers: LayerChoice = about(
        "base layers, counted from 0, that get learners: 'all', [0, 4], 'every:4'", "all"
    )
    rank: Annotated[int, Option("Rank of the learners.")] = about(
        "rank of every learner matrix (64 in the scripts)", 64, ge=1
    )
    heads: Annotated[int | None, Option("Heads of each learner.")] = about(
        "heads of a learner, dividing the hidden size; None: as many as the base has", ge=1
    )
    learners: Annotated[list[LearnerName], Option("Learners: visual,textual or one.")] = about(
        "learners beside the attention", ["visual", "textual"]
    )
    router: bool = about(
        "weigh two learners by the router; with one learner there is nothing to weigh", True
    )
    variant: Annotated[Literal["paper"], Option("Variant: paper or official.")] = about(
        "the paper's equations; the published code is method wings-official", "paper"
    )
    max_length: Annotated[int | None, Option("Longest row that the router weighs.")] = about(
        "columns of the router, the longest row it can weigh; None: the base's maximum", ge=1
    )
    base: Literal["frozen", "full"] = about(
        "full: the base is trained too, as in the paper, and its text answers change", "frozen"
    )

    @property
    def routed(self) -> bool:
        """Return whether a router stands in every chosen layer: it takes two learners to weigh."""
        return self.router and len(self.learners) == 2

    @field_validator("learners")
    @classmethod
    def _check_learners(cls, value: list[LearnerName]) -> list[LearnerName]:
        if not value:
            raise ValueError("no learner is left; name visual, textual or both")
        if len(set(value)) < len(value):
            raise ValueError("a learner is named twice; name each once")
        return sorted(value, reverse=True)  # visual first, so that router columns have one order


class WingsStage(StageSwitches):
    """Choose the learners in the path, and the router."""

    learners: list[LearnerName] | None = about("in the path")
    router: bool | None = about("false adds a learner with weight 1")

    def check_switches(self, train: Sequence[str]) -> None:
        if self.learners is None:
            return
        for learner in sorted({"visual", "textual"} - set(self.learners)):
            if f"learners.{learner}" in train:
                raise ValueError(
                    f"trains learners.{learner}, but learners leaves it out of the path; "
                    f"add {learner} to learners"
                )


def refuses(anatomy: "Anatomy") -> str | None:
    """Return the reason why a base cannot take learners beside its attention."""
    if anatomy.branch_blocked is not None:
        return anatomy.branch_blocked
    if anatomy.embedding_size != anatomy.hidden_size:
        return (
            f"{anatomy.model_type} embeds tokens in {anatomy.embedding_size} numbers but its "
            f"layers have {anatomy.hidden_size}, and learners need both the same"
        )
    return None


def as_decoder(config: WingsConfig, active: bool) -> PlainDecoder:
    """Refuse: no plain decoder has learners."""
    raise UsageError(
        "Wings adds learners and a router beside the attention of its layers, and LLaVA has "
        "a projector and a plain decoder, nothing else"
    )


def part_of(tensor: str) -> str:
    """Return the part that a tensor is counted with."""
    words = tensor.split(".")  # layers.3.visual.query.up.weight
    learner = next((f"{one} learners" for one in ("visual", "textual") if one in words), None)
    return learner or ("router" if "router" in words else words[0])
