"""LoRA behind a gate, slowly: each position of one row by itself, with merged weights of its own.

A position whose gate is open is multiplied by ``W + (alpha / r) B A``, any other by ``W``. Nothing
of mmgraft or transformers is used.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from reference.decoder import State, causal_mask, merge_heads, rms_norm, rotate, split_heads

Adapters = Mapping[str, tuple[Tensor, Tensor]]
"""Name of a linear layer in the base -> its ``A (r, in)`` and ``B (out, r)``."""


def adapted(
    state: State, adapters: Adapters, scale: float, name: str, x: Tensor, gate: Tensor
) -> Tensor:
    """One linear layer over a row: x (s, in), gate (s,) booleans."""
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    out = []
    for position, is_open in zip(x, gate.tolist(), strict=True):
        own = weight
        if is_open and name in adapters:
            down, up = adapters[name]
            own = weight + scale * up @ down
        out.append(own @ position if bias is None else own @ position + bias)
    return torch.stack(out)


def lora_reference(
    state: State, adapters: Adapters, scale: float, config: Mapping, x: Tensor, gate: Tensor
) -> Tensor:
    """The logits (s, vocab) of one unpadded row through a Llama with adapters.

    Args:
        state: the base, by its own names.
        adapters: of the linear layers that have one.
        scale: alpha / r.
        config: the base's config.
        x: (s, h) token embeddings, with projected image features at image positions.
        gate: (s,) true where the adapters act.
    """
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    positions, theta = torch.arange(len(x)), config["rope_theta"]
    seen, eps = causal_mask(len(x)), config["rms_norm_eps"]

    def linear(name: str, given: Tensor) -> Tensor:
        return adapted(state, adapters, scale, name, given, gate)

    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}"
        normed = rms_norm(x, state[f"{at}.input_layernorm.weight"], eps)
        query, key, value = (linear(f"{at}.self_attn.{part}_proj", normed) for part in "qkv")
        query = rotate(split_heads(query, heads), positions, theta)
        key = rotate(split_heads(key, groups), positions, theta).repeat_interleave(
            heads // groups, dim=0
        )
        value = split_heads(value, groups).repeat_interleave(heads // groups, dim=0)
        scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
        mixed = scores.masked_fill(~seen, -math.inf).softmax(-1) @ value
        x = x + linear(f"{at}.self_attn.o_proj", merge_heads(mixed))
        normed = rms_norm(x, state[f"{at}.post_attention_layernorm.weight"], eps)
        inner = functional.silu(linear(f"{at}.mlp.gate_proj", normed))
        x = x + linear(f"{at}.mlp.down_proj", inner * linear(f"{at}.mlp.up_proj", normed))
    return rms_norm(x, state["model.norm.weight"], eps) @ state["lm_head.weight"].T
