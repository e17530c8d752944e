"""LLaVA's projector as the baseline (arXiv 2304.08485): nothing is added to the base."""

from mmgraft.grafts.base import Graft


class LlavaGraft(Graft):
    """No modules beside the projector. ``base: full`` in a recipe trains the base too."""

    method = "llava"
