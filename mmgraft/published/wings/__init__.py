"""Wings as its published code computes it, for published checkpoints (arXiv 2406.03496)."""

from mmgraft.grafts import wings
from mmgraft.grafts.method import Method
from mmgraft.published.wings import config

METHOD = Method(
    name="wings-official",
    title="what the published Wings code computes, for its checkpoints",
    paper="arXiv 2406.03496",
    config_class=config.OfficialWingsConfig,
    graft="mmgraft.published.wings.graft:OfficialWingsGraft",
    groups={},
    refuses=config.refuses,
    promises=lambda settings: config.PROMISES,
    part_of=wings.METHOD.part_of,
    as_decoder=wings.METHOD.as_decoder,
)
