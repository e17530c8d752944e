"""LoRA: low-rank adapters on the base's linear layers, for rows or positions that see."""

from mmgraft.grafts.lora import config
from mmgraft.grafts.method import FrozenBase, Method, without_linears

METHOD = Method(
    name="lora",
    title="low-rank adapters on the base's linear layers, behind a gate",
    paper="arXiv 2503.01743",
    config_class=config.LoraConfig,
    graft="mmgraft.grafts.lora.graft:LoraGraft",
    recipe="lora.yaml",
    groups=config.GROUPS,
    stage=FrozenBase,
    refuses=without_linears,
    promises=config.promises,
    as_decoder=config.as_decoder,
    as_adapter=config.as_adapter,
)
