"""Settings of a Wings graft."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from mmgraft.strict import LayerChoice, StrictModel

LearnerName = Literal["visual", "textual"]


class WingsConfig(StrictModel):
    """Which base layers get learners, of which kind and size, and how their outputs are weighed.

    Source: Wings, arXiv 2406.03496. `variant: official` computes what the published code computes,
    defects included, and serves to load published checkpoints only; it promises no invariant.
    """

    method: Literal["wings"] = "wings"
    layers: LayerChoice = Field(
        "all",
        description="base layers, counted from 0, that get learners: 'all', [0, 4], 'every:4'",
    )
    rank: int = Field(64, ge=1, description="rank of every learner matrix (64 in the scripts)")
    heads: int | None = Field(
        None,
        ge=1,
        description="heads of a learner, dividing the hidden size; None: as many as the base has",
    )
    learners: list[LearnerName] = Field(
        default=["visual", "textual"], description="which learners stand beside the attention"
    )
    router: bool = Field(
        True,
        description="weigh two learners by the router; with one learner there is nothing to weigh",
    )
    variant: Literal["paper", "official"] = Field(
        "paper",
        description="official: what the published code computes, for published checkpoints only",
    )
    max_length: int | None = Field(
        None,
        ge=1,
        description="columns of the router, the longest row it can weigh; None: the base's maximum",
    )
    base: Literal["frozen", "full"] = Field(
        "frozen",
        description="full: the base is trained too, as in the paper, and its text answers change",
    )
    system_prompt_length: int | None = Field(
        None,
        ge=0,
        description="official only: tokens at the start of a row that no textual learner sees",
    )
    image_token_length: int | None = Field(
        None, ge=1, description="official only: positions of the one image that a row has"
    )
    router_width: int = Field(
        4096, ge=1, description="official only: columns of the published router"
    )

    @property
    def routed(self) -> bool:
        """Whether a router stands in every chosen layer: it takes two learners to weigh."""
        return self.router and len(self.learners) == 2

    @field_validator("learners")
    @classmethod
    def _check_learners(cls, value: list[LearnerName]) -> list[LearnerName]:
        if not value:
            raise ValueError("no learner is left; name visual, textual or both")
        if len(set(value)) < len(value):
            raise ValueError("a learner is named twice; name each once")
        return sorted(value, reverse=True)  # visual first, so that router columns have one order

    @model_validator(mode="after")
    def _check_variant(self) -> Self:
        if self.variant == "official":
            self._check_official()
        else:
            self._check_paper()
        return self

    def _check_official(self) -> None:
        lengths = {
            "system_prompt_length": self.system_prompt_length,
            "image_token_length": self.image_token_length,
        }
        missing = [name for name, length in lengths.items() if length is None]
        if missing:
            raise ValueError(
                f"variant official needs {' and '.join(missing)}: "
                "copy them from the published checkpoint's config"
            )
        wrong = {
            "heads": self.heads is not None,
            "max_length": self.max_length is not None,
            "base": self.base != "frozen",
        }
        for name in (name for name, is_set in wrong.items() if is_set):
            reason = "it cannot be trained" if name == "base" else "the published code fixes it"
            raise ValueError(f"variant official takes no {name}: {reason}; leave {name} out")
        if self.learners == ["textual"]:
            raise ValueError("variant official has no textual learner alone; use both or visual")
        if len(self.learners) == 2 and not self.router:
            raise ValueError(
                "variant official without a router is stage 1, which uses the visual learner "
                "alone; set learners: [visual]"
            )

    def _check_paper(self) -> None:
        only_official = {
            "system_prompt_length": self.system_prompt_length is not None,
            "image_token_length": self.image_token_length is not None,
            "router_width": self.router_width != 4096,
        }
        for name in (name for name, is_set in only_official.items() if is_set):
            raise ValueError(
                f"{name} belongs to variant official; leave it out"
                + (", or set max_length" if name == "router_width" else "")
            )
