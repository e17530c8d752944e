"""Smaller configurations of a base's own class, to try in moments what a base does."""

import re
from typing import Any

from transformers import PreTrainedConfig

LAYERS, HEADS, HEAD, WIDTH = 4, 4, 16, 64
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")

# The first rule that fits a name says how large its number may be.
_RULES: tuple[tuple[str, int], ...] = (
    (r"_id$|_index$", 319),
    (r"index\w*heads|feed_forward$|kernel|interval|pattern|n_top|pretraining", 1 << 62),
    (r"period", 2),
    (r"topk_blocks|offset", 1),
    (r"index\w*topk", 8),
    (r"index\w*block", 3),
    (r"topk_group|shared_experts?$|dense_layers|first_k|shared_layers|nextn|expand", 1),
    (r"n_group$|num_expert_group|experts?_per_tok|top_?k|moe_k$", 2),
    (r"experts?$|expert_num$", 8),
    (r"vocab", 320),
    (r"layers?$|num_blocks$", LAYERS),
    (r"kv_?heads|key_value_heads|kv_?groups", HEADS // 2),
    (r"attention_head_dim", 2 * HEAD),
    (r"attention_hidden_size", 2 * WIDTH),
    (r"rotary_dim|nope|rope_head", HEAD // 2),
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

#: Numbers that stay equal where they are.
_EQUAL = (("num_key_value_heads", "num_attention_heads"), ("head_dim", "qk_rope_head_dim"))


def shrunken(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a configuration of the same class with few layers, heads and numbers."""
    return type(config).from_dict(_smaller(config.to_dict()))


def _smaller(given: dict[str, Any]) -> dict[str, Any]:
    """Shrink the numbers of one configuration, and of those inside it by themselves."""
    words = [len(v) for v in given.values() if isinstance(v, list) and v and isinstance(v[0], str)]
    counts = (given[name] for name in _COUNTS if isinstance(given.get(name), int))
    many = next(counts, max(words, default=0))
    by_layer = [v for v in given.values() if isinstance(v, list) and len(v) == many > LAYERS]
    kept = _kept(by_layer, many)
    made = {name: _value(name, value, many, kept) for name, value in given.items()}
    for one, other in _EQUAL:
        if given.get(one) is not None and given[one] == given.get(other):
            made[one] = made[other]
    return made


def _value(name: str, value: Any, many: int, kept: list[int]) -> Any:
    """Shrink one value of a configuration of so many layers, of which these are kept."""
    if name == "per_layer_config" and all(str(at).isdigit() for at in value or ["none"]):
        inside = {int(at): one for at, one in value.items() if int(at) in kept}
        return {kept.index(at): _smaller(one) for at, one in inside.items()}
    if isinstance(value, dict):
        return _smaller(value)
    if isinstance(value, list):
        if len(value) == many > LAYERS:
            value = [value[index] for index in kept]
        elif many > LAYERS and re.search(r"indices|idx|layers$|layer_ids$", name):
            return [kept.index(index) for index in value if index in kept]
        return [_value(name, one, many, kept) for one in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if value == many > LAYERS and "layers" in name:
        return LAYERS
    return min(value, next((most for rule, most in _RULES if re.search(rule, name)), value))


def _kept(by_layer: list[list[Any]], many: int) -> list[int]:
    """Return the layers that stay: the first of each kind that the lists tell apart, the second."""
    kinds = [repr([values[index] for values in by_layer]) for index in range(many)]
    order = sorted(range(many), key=lambda index: (kinds[:index].count(kinds[index]), index))
    return sorted(order[:LAYERS])
