"""Gated cross-attention: blocks between base layers that read images beside the sequence."""

from mmgraft.grafts.method import Method
from mmgraft.grafts.xattn import config

METHOD = Method(
    name="xattn",
    title="gated cross-attention blocks between base layers",
    paper="arXiv 2407.21783",
    config_class=config.XattnConfig,
    graft="mmgraft.grafts.xattn.graft:XattnGraft",
    recipe="xattn.yaml",
    groups=config.GROUPS,
    stage=config.XattnStage,
    promises=config.promises,
    part_of=config.part_of,
    as_decoder=config.as_decoder,
    memory=True,
    rates={"gates": config.GATE_RATE},
)
