"""Settings of a LLaVA graft."""

from typing import Literal

from pydantic import Field

from mmgraft.strict import StrictModel


class LlavaConfig(StrictModel):
    """The projector alone; what the other methods add to.

    Source: LLaVA, arXiv 2304.08485 and 2310.03744.
    """

    method: Literal["llava"] = "llava"
    base: Literal["frozen", "full"] = Field(
        "frozen",
        description="full: the base is trained after the projector, and its text answers change",
    )
