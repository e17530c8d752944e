"""The plain parts of a Llama-like decoder and of a CLIP tower, one tensor operation after another.

Everything takes an explicit state dict (the checkpoint's own names) and works on one row, so that
a reader can hold each line against the equations. Nothing of mmgraft or transformers is used.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

State = Mapping[str, Tensor]
Product = Callable[[State, str, Tensor], Tensor]
"""Computes a linear layer from the checkpoint, the layer's name and ``x (s, in)``."""


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """`x W^T + b`, where `b` may be absent."""
    return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, positions: Tensor, theta: float | None) -> Tensor:
    """Rotary position embedding without scaling, the first half paired with the second.

    Args:
        x: (..., s, d) queries or keys.
        positions: (s,) position of each token.
        theta: the base frequency; `None` leaves `x` alone.
    """
    if theta is None:
        return x
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.to(torch.float64)[:, None] * frequency  # (s, d/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(s, n·d) -> (n, s, d)."""
    return x.view(x.shape[0], heads, x.shape[1] // heads).transpose(0, 1)


def merge_heads(x: Tensor) -> Tensor:
    """(n, s, d) -> (s, n·d)."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def causal_mask(length: int, real: int | None = None) -> Tensor:
    """(length, length) booleans, `[query, key]` true where seen; keys from `real` on are not."""
    index = torch.arange(length)
    seen = index[None, :] <= index[:, None]
    return seen if real is None else seen & (index[None, :] < real)


def self_attention(
    state: State, prefix: str, x: Tensor, config: Mapping, seen: Tensor,
    positions: Tensor | None = None, product: Product = linear,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The base's attention on one row, with grouped KV heads.

    Args:
        state: the checkpoint.
        prefix: name of the attention module.
        x: (s, h) normalised input.
        config: the model's config.
        seen: (s, s) booleans, which key each query sees.
        positions: (s,) what queries and keys are rotated by; counted from 0 where not given.
        product: computes a linear layer.

    Returns:
        The output (s, h) and the attention probabilities (n, s, s).
    """
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    theta = config["rope_theta"]
    positions = torch.arange(x.shape[0]) if positions is None else positions
    query = rotate(split_heads(product(state, f"{prefix}.q_proj", x), heads), positions, theta)
    key = rotate(split_heads(product(state, f"{prefix}.k_proj", x), groups), positions, theta)
    value = split_heads(product(state, f"{prefix}.v_proj", x), groups)
    key = key.repeat_interleave(heads // groups, dim=0)
    value = value.repeat_interleave(heads // groups, dim=0)
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])  # (n, s, s)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return product(state, f"{prefix}.o_proj", merge_heads(weights @ value)), weights


def mlp(state: State, prefix: str, x: Tensor, product: Product = linear) -> Tensor:
    """Gated MLP with SiLU."""
    gate = functional.silu(product(state, f"{prefix}.gate_proj", x))
    return product(state, f"{prefix}.down_proj", gate * product(state, f"{prefix}.up_proj", x))


def decoder_layer(
    state: State, prefix: str, x: Tensor, config: Mapping, seen: Tensor,
    positions: Tensor | None = None, product: Product = linear,
) -> Tensor:  # fmt: skip
    """A whole pre-norm decoder layer: (s, h) -> (s, h); see ``self_attention``."""
    eps = config["rms_norm_eps"]
    normed = rms_norm(x, state[f"{prefix}.input_layernorm.weight"], eps)
    attention = f"{prefix}.self_attn"
    x = x + self_attention(state, attention, normed, config, seen, positions, product)[0]
    normed = rms_norm(x, state[f"{prefix}.post_attention_layernorm.weight"], eps)
    return x + mlp(state, f"{prefix}.mlp", normed, product)


def llama_logits(
    state: State, config: Mapping, x: Tensor, positions: Tensor | None, product: Product
) -> Tensor:
    """Logits (s, vocab) of embeddings (s, h) of one unpadded row; see ``self_attention``."""
    seen = causal_mask(len(x))
    for index in range(config["num_hidden_layers"]):
        x = decoder_layer(state, f"model.layers.{index}", x, config, seen, positions, product)
    normed = rms_norm(x, state["model.norm.weight"], config["rms_norm_eps"])
    return normed @ state["lm_head.weight"].T


def clip_features(state: State, prefix: str, config: Mapping, pixels: Tensor, layer: int) -> Tensor:
    """Patch features of one image from hidden state `layer` of a CLIP encoder, class token dropped.

    Args:
        state: the checkpoint.
        prefix: name of the vision transformer within it.
        config: CLIP's vision config (quick GELU).
        pixels: (3, H, W) normalised pixels.
        layer: index into [embeddings, layer 0, ..., last layer]; -2 is before the last layer.

    Returns:
        (patches, hidden)
    """
    patch, eps = config["patch_size"], config["layer_norm_eps"]
    heads, width = config["num_attention_heads"], config["hidden_size"]

    def norm(name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(
            x, (width,), state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"], eps
        )

    kernel = state[f"{prefix}.embeddings.patch_embedding.weight"]
    patches = functional.conv2d(pixels[None], kernel, stride=patch)[0].flatten(1).T
    x = torch.cat([state[f"{prefix}.embeddings.class_embedding"][None], patches])
    x = norm("pre_layrnorm", x + state[f"{prefix}.embeddings.position_embedding.weight"])
    states = [x]
    for i in range(config["num_hidden_layers"]):
        block = f"{prefix}.encoder.layers.{i}"
        normed = norm(f"encoder.layers.{i}.layer_norm1", x)
        query, key, value = (
            split_heads(linear(state, f"{block}.self_attn.{part}_proj", normed), heads)
            for part in "qkv"
        )
        weights = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(-1)
        x = x + linear(state, f"{block}.self_attn.out_proj", merge_heads(weights @ value))
        inner = linear(state, f"{block}.mlp.fc1", norm(f"encoder.layers.{i}.layer_norm2", x))
        x = x + linear(state, f"{block}.mlp.fc2", inner * torch.sigmoid(1.702 * inner))
        states.append(x)
    return states[layer][1:]


def project(state: State, prefix: str, features: Tensor) -> Tensor:
    """The `mlp2x_gelu` projector: two linear layers with an exact GELU between."""
    return linear(state, f"{prefix}.2", functional.gelu(linear(state, f"{prefix}.0", features)))
