"""Smaller configurations of a base's own class, to try in moments what a base does."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

LAYERS, HEADS, HEAD, WIDTH = 4, 4, 16, 64
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")

# The first rule that fits a name says how large its number may be.
_RULES: tuple[tuple[str, int], ...] = (
    (r"_id$|_index$", 319),
    (r"feed_forward$|kernel|period|offset|interval|pattern|n_top|pretraining", 1 << 62),
    (r"topk_group|shared_experts?$|dense_layers|first_k|shared_layers|nextn|expand", 1),
    (r"n_group$|num_expert_group|experts?_per_tok|top_?k|moe_k$", 2),
    (r"experts?$|expert_num$", 8),
    (r"vocab", 320),
    (r"layers?$|num_blocks$", LAYERS),
    (r"kv_?heads|key_value_heads|kv_?groups", HEADS // 2),
    (r"qk_head_dim", 2 * HEAD),
    (r"rotary_dim", HEAD // 2),
    (r"head_?(dim|size)|dim_head|d_?head$|kv_channels", HEAD),
    (r"heads?$|heads|n_?groups", HEADS),
    (r"rank|state|buckets", 16),
    (r"window|block_size|chunk|local_attention", 8),
    (r"position|n_ctx|seq_len|length|context", 256),
    (
        r"hidden|d_model|n_embd|emb|inner|ff|mlp|intermediate|width|dim|size|scalar|proj|d_ssm",
        WIDTH,
    ),
)


def shrunken(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a configuration of the same class with few layers, heads and numbers."""
    return type(config).from_dict(_smaller(config.to_dict()))


def _smaller(given: dict[str, Any]) -> dict[str, Any]:
    """Shrink the numbers of one configuration, and of those inside it by themselves."""
    many = next((given[name] for name in _COUNTS if isinstance(given.get(name), int)), 0)
    by_layer = [v for v in given.values() if isinstance(v, list) and len(v) == many > LAYERS]
    kept = _kept(by_layer, many)

    def smaller(name: str, value: Any) -> Any:
        if name == "per_layer_config" and value:
            return {kept.index(at): _smaller(one) for at, one in value.items() if at in kept}
        if isinstance(value, dict):
            return _smaller(value)
        if isinstance(value, list) and len(value) == many > LAYERS:
            return [smaller(name, value[index]) for index in kept]
        if isinstance(value, list) and re.search(r"indices|idx|layers$", name):
            return [kept.index(index) for index in value if index in kept]
        if isinstance(value, list):
            return [smaller(name, one) for one in value]
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        most = next((most for rule, most in _RULES if re.search(rule, name)), value)
        return min(value, most)

    made = {name: smaller(name, value) for name, value in given.items()}
    heads, pairs = "num_attention_heads", "num_key_value_heads"
    if given.get(pairs) is not None and given[pairs] == given.get(heads):
        made[pairs] = made[heads]
    return made


def _kept(by_layer: list[list[Any]], many: int) -> list[int]:
    """Return the layers that stay: one of each kind that the lists tell apart, then the first."""
    kinds = [repr([values[index] for values in by_layer]) for index in range(many)]
    order = sorted(range(many), key=lambda index: (kinds.index(kinds[index]) != index, index))
    return sorted(order[:LAYERS])
