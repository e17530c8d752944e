"""LLaVA: the projector alone, base frozen or trained: the baseline (arXiv 2304.08485)."""

from mmgraft.grafts.llava.config import LlavaConfig
from mmgraft.grafts.method import Method, PlainDecoder, Promises

METHOD = Method(
    name="llava",
    title="the projector alone, base frozen or trained: the baseline",
    paper="arXiv 2304.08485",
    config_class=LlavaConfig,
    graft="mmgraft.grafts.llava.graft:LlavaGraft",
    recipe="llava.yaml",
    groups={},
    promises=lambda config: Promises(
        before="", fresh="a projector is all it has: what it puts into a row is new from the start"
    ),
    as_decoder=lambda config, active: PlainDecoder(),
)
