"""Settings of a LLaVA graft."""

from typing import Literal

from mmgraft.strict import StrictModel, about


class LlavaConfig(StrictModel):
    """The projector alone; what the other methods add to.

    Source: LLaVA, arXiv 2304.08485 and 2310.03744.
    """

    method: Literal["llava"] = "llava"
    base: Literal["frozen", "full"] = about(
        "full: the base is trained after the projector, and its text answers change", "frozen"
    )
