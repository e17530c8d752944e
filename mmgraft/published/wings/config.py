"""Settings of a graft that computes what the published Wings code computes."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from mmgraft.grafts.method import Promises
from mmgraft.strict import LayerChoice, StrictModel, about

if TYPE_CHECKING:
    from mmgraft.anatomy import Anatomy

LearnerName = Literal["visual", "textual"]

_DOES = "it computes what the published code computes"
PROMISES = Promises(
    text=_DOES,
    beside=_DOES,
    fresh=_DOES,
    cache=f"{_DOES}: later tokens change earlier outputs, so every token computes all again",
    neighbours=f"{_DOES}: its masks depend on the longest text of the batch",
    causal=f"{_DOES}: its textual learner sees later text from earlier positions",
    padding=f"{_DOES}: rows are padded on the right, or run one by one",
    no_image=f"{_DOES}: every row has exactly one image of a fixed number of positions",
    training="it leaks later text into earlier positions, so training it teaches nothing: graft "
    "with --method wings",
)


class OfficialWingsConfig(StrictModel):
    """Settings of the learners, and the lengths that the published code fixes.

    Source: the published code of Wings, arXiv 2406.03496. It serves to load published checkpoints.
    """

    method: Literal["wings-official"] = "wings-official"
    layers: LayerChoice = about(
        "base layers, counted from 0, that have learners: 'all', [0, 4]", "all"
    )
    rank: int = about("rank of every learner matrix (64 in the scripts)", 64, ge=1)
    learners: list[LearnerName] = about(
        "visual, textual, or visual alone (stage 1)", ["visual", "textual"]
    )
    router: bool = about("weigh two learners by the router", True)
    system_prompt_length: int = Field(
        ge=0, description="tokens at the start of a row that no textual learner sees"
    )
    image_token_length: int = Field(ge=1, description="positions of the one image that a row has")
    router_width: int = about("columns of the published router", 4096, ge=1)

    @property
    def routed(self) -> bool:
        """Return whether a router stands in every chosen layer: it takes two learners to weigh."""
        return self.router and len(self.learners) == 2

    @field_validator("learners")
    @classmethod
    def _visual_first(cls, value: list[LearnerName]) -> list[LearnerName]:
        if "visual" not in value or len(set(value)) < len(value):
            raise ValueError("write [visual, textual], or [visual] for stage 1")
        return sorted(value, reverse=True)  # the router's columns have one order

    @model_validator(mode="after")
    def _stage_one_is_visual(self) -> Self:
        if len(self.learners) == 2 and not self.router:
            raise ValueError(
                "without a router it is stage 1, which uses the visual learner alone; set "
                "learners: [visual]"
            )
        return self


def refuses(anatomy: "Anatomy") -> str | None:
    """Return the reason why a base cannot take what was published for Llama and Qwen2."""
    plain = anatomy.branch_norm is None and anatomy.residual_scale == 1.0
    if anatomy.rope_theta is None or anatomy.parallel_block or not plain:
        return f"the published Wings code knows Llama and Qwen2 only, not {anatomy.model_type}"
    return None
