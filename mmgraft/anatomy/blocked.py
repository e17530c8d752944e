"""Find decoder layers that cannot carry a graft, and those whose attention must be explicit."""

import ast
import inspect
import re
import textwrap
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer, StaticLayer

# Words in the class name of a layer's part that mixes positions by a running state.
_RECURRENT = re.compile(r"Mamba|Rwkv|Recurrent|RGLRU|SSM|LSTM|Delta|Lightning|ShortConv|Hyena")

_CACHES = {"past_key_values", "past_key_value", "layer_past", "kwargs"}

_ORDINARY_KEYWORDS = {
    "attention_mask", "dropout", "scaling", "sliding_window", "is_causal", "position_ids",
    "output_attentions",
}  # fmt: skip


def keeps_keys(cached: Any) -> bool:
    """Return whether a cache layer keeps exact keys and values, position by position.

    Args:
        cached: Of a cache that transformers made.
    """
    kinds = " ".join(one.__name__ for one in type(cached).__mro__)
    of_positions = isinstance(cached, DynamicLayer | StaticLayer)
    return of_positions and not re.search("Linear|Quantized", kinds)


def blocked_layer(
    layer: nn.Module,
    index: int,
    layer_type: str,
    cached: Any,
    attention: str | None,
    config: PreTrainedConfig,
) -> str | None:
    """Return the reason why one decoder layer cannot carry a graft, or None if it can.

    Args:
        layer: The decoder layer.
        index: Its number, counted from 0.
        layer_type: Its type as the cache sees it.
        cached: What transformers' cache has for it.
        attention: Dotted name of its attention; None if it has none.
        config: The base's text configuration.
    """
    recurrent = next(
        (type(m).__name__ for m in layer.modules() if _RECURRENT.search(type(m).__name__)), None
    )
    if recurrent is not None:
        return (
            f"its {recurrent} keeps a running state, so that rows of one batch cannot be told "
            "apart by position"
        )
    sharing = getattr(config, "kv_sharing_modes", None)
    if sharing[index] if sharing else getattr(config, "num_kv_shared_layers", 0):
        return "it shares keys and values with other layers"
    if not keeps_keys(cached):
        return f"a {layer_type} layer does not keep keys and values position by position"
    if attention is None:
        return "it has no attention"
    arguments = list(inspect.signature(type(layer).forward).parameters)
    if not _CACHES & set(arguments):
        return "it keeps no keys and values, so it cannot go on from a cache"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return "its attention is scaled by the layer's number (scale_attn_by_inverse_layer_idx)"
    return None


def in_registry(attention: nn.Module) -> bool:
    """Return whether an attention calls a function of transformers' attention registry."""
    return any("ALL_ATTENTION_FUNCTIONS" in source for source in _class_sources(type(attention)))


def explicit_weights_reason(model: nn.Module, attention: nn.Module) -> str | None:
    """Return why columns beside the values do not read the attention's weights, or None.

    That is exact only if the attention function does nothing but softmax(q k^T) v, with a mask.
    """
    name = type(attention).__name__
    if not in_registry(attention):
        return f"{name} does not go through the attention registry of transformers"
    calls = _interface_calls(attention)
    if len(calls) != 1:
        return f"{name} calls its attention function in {len(calls)} places"
    for keyword, value in ((k.arg, k.value) for k in calls[0].keywords):
        if keyword is None:
            continue
        if keyword not in _ORDINARY_KEYWORDS and _is_active(value, attention):
            known = {"s_aux": "attention sinks", "sinks": "attention sinks"}
            known["softcap"] = "soft-capped attention weights"
            return f"{name} uses {known.get(keyword, f'an attention with {keyword}')}"
    if getattr(attention, "reorder_and_upcast_attn", False):
        return f"{name} computes its weights by itself (reorder_and_upcast_attn)"
    if not getattr(model, "_supports_sdpa", False):
        return f"{type(model).__name__} has no fused attention"
    return None


@cache  # finding a class in its file parses the whole file
def _class_sources(module_class: type[nn.Module]) -> list[str]:
    sources = []
    for cls in module_class.__mro__:
        if cls is nn.Module:
            break
        try:
            sources.append(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError):
            continue  # a class made at run time has no source; its bases have
    return sources


def _interface_calls(attention: nn.Module) -> list[ast.Call]:
    return [
        node
        for source in _class_sources(type(attention))[:1]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "attention_interface"
    ]


def _is_active(value: ast.expr, attention: nn.Module) -> bool:
    """Return whether a keyword is more than None, as far as the source and the module say."""
    missing = object()
    found: Any = missing
    if isinstance(value, ast.Constant):
        found = value.value
    elif (
        isinstance(value, ast.Attribute)
        and isinstance(value.value, ast.Name)
        and value.value.id == "self"
    ):
        found = getattr(attention, value.attr, missing)
    return found is missing or (found is not None and found is not False)
