"""LoRA behind a gate: adapters on the base's own linear layers, never merged into them.

``y = W x + (alpha / r) B A x`` where the gate is open, ``y = W x`` elsewhere. ``W x`` is the
base's own product of all positions, and what is added is computed for the chosen positions alone.
"""

from mmgraft.anatomy import Anatomy
from mmgraft.grafts.base import BaseParts
from mmgraft.grafts.lora.config import GROUPS, LoraConfig
from mmgraft.grafts.on_linears import Adapter, OnLinears, Sizes


class LoraGraft(OnLinears):
    """Adapters on the linear layers of chosen base layers, each under its linear layer's name:
    ``attention.0.self_attn.q_proj.down.weight``.
    """

    method = "lora"

    def __init__(self, config: LoraConfig, anatomy: Anatomy, parts: BaseParts | None) -> None:
        def make(sizes: Sizes) -> dict[str, Adapter]:
            rest = config.rank, config.scale, config.dropout
            return {name: Adapter(size, *rest) for name, size in sizes.items()}

        targets = list(GROUPS) if config.targets == "all" else [config.targets]
        super().__init__(config, anatomy, targets, "--targets", make, config.gate == "token")
