"""LLaVA's projector as the baseline (arXiv 2304.08485): nothing is added to the base."""

from __future__ import annotations

from mmgraft.anatomy import Anatomy
from mmgraft.grafts.base import BaseParts, Graft
from mmgraft.grafts.llava.config import LlavaConfig


class LlavaGraft(Graft):
    """No modules beside the projector. ``base: full`` in a recipe trains the base too."""

    method = "llava"

    def __init__(self, config: LlavaConfig, anatomy: Anatomy, parts: BaseParts | None) -> None:
        super().__init__(config, anatomy)
