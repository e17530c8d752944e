"""IAA: decoder layers inserted after chosen base layers, each a trained copy (arXiv 2408.12902)."""

from mmgraft.grafts.iaa import config
from mmgraft.grafts.method import FrozenBase, Method

METHOD = Method(
    name="iaa",
    title="decoder layers inserted after chosen base layers",
    paper="arXiv 2408.12902",
    config_class=config.IAAConfig,
    graft="mmgraft.grafts.iaa.graft:IAAGraft",
    recipe="iaa.yaml",
    groups=config.GROUPS,
    stage=FrozenBase,
    promises=config.promises,
    unused=config.unused,
    part_of=config.part_of,
    as_decoder=config.as_decoder,
)
