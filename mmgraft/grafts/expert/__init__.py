"""The visual expert: weights of its own for image positions, beside those of the frozen base."""

from mmgraft.grafts.expert import config
from mmgraft.grafts.method import FrozenBase, Method, without_linears

METHOD = Method(
    name="expert",
    title="weights of its own for image positions, in linear layers",
    paper="arXiv 2311.03079",
    config_class=config.ExpertConfig,
    graft="mmgraft.grafts.expert.graft:ExpertGraft",
    recipe="expert.yaml",
    groups=config.GROUPS,
    stage=FrozenBase,
    refuses=without_linears,
    promises=config.promises,
    as_decoder=config.as_decoder,
)
