"""Wings: low-rank learners beside the attention, weighed by a router (arXiv 2406.03496)."""

from mmgraft.grafts.method import Method, Promises
from mmgraft.grafts.wings import config

METHOD = Method(
    name="wings",
    title="low-rank learners beside the attention, weighed by a router",
    paper="arXiv 2406.03496",
    config_class=config.WingsConfig,
    graft="mmgraft.grafts.wings.graft:WingsGraft",
    recipe="wings.yaml",
    groups=config.GROUPS,
    stage=config.WingsStage,
    refuses=config.refuses,
    promises=lambda config: Promises(
        before="learners act on every position of a row with an image"
    ),
    part_of=config.part_of,
    as_decoder=config.as_decoder,
)
