"""The two Perceiver resamplers, one latent, one head and one key after another.

Flamingo (arXiv 2204.14198, appendix A.1.1) and Idefics2 (arXiv 2405.02246, the `perceiver` of its
published configuration). `w` holds the parameters by name; vectors are one-dimensional.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Vector = Tensor


def layer_norm(x: Vector, w: Weights, name: str) -> Vector:
    centred = x - x.mean()
    spread = math.sqrt(float((centred**2).mean()) + 1e-5)
    return centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(x: Vector, w: Weights, name: str) -> Vector:
    return x / math.sqrt(float((x**2).mean()) + 1e-6) * w[f"{name}.weight"]


def gelu(x: Vector) -> Vector:
    return torch.tensor([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()])


def silu(x: Vector) -> Vector:
    return torch.tensor([v / (1 + math.exp(-v)) for v in x.tolist()])


def gated(x: Vector, w: Weights, name: str) -> Vector:
    inner = silu(w[f"{name}.gate.weight"] @ x) * (w[f"{name}.up.weight"] @ x)
    return w[f"{name}.down.weight"] @ inner


def plain(x: Vector, w: Weights, name: str) -> Vector:
    return w[f"{name}.2.weight"] @ gelu(w[f"{name}.0.weight"] @ x)


def read(
    latents: list[Vector],
    features: list[Vector],
    w: Weights,
    name: str,
    heads: int,
    kv_heads: int,
    norm: Callable[[Vector, Weights, str], Vector],
) -> list[Vector]:
    """Return what attention adds to each latent; features and latents are its keys."""
    own = [norm(x, w, f"{name}.norm_latents") for x in latents]
    keys = [*(norm(x, w, f"{name}.norm_features") for x in features), *own]
    size = len(w[f"{name}.q.weight"]) // heads
    added = []
    for query in own:
        mixed = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            rows = slice(group * size, (group + 1) * size)
            q = w[f"{name}.q.weight"][head * size : (head + 1) * size] @ query
            scores = [float(q @ (w[f"{name}.k.weight"][rows] @ x)) / math.sqrt(size) for x in keys]
            shares = [math.exp(score - max(scores)) for score in scores]
            values = [w[f"{name}.v.weight"][rows] @ x for x in keys]
            total = sum(shares)
            mixed.append(sum(s / total * v for s, v in zip(shares, values, strict=True)))
        added.append(w[f"{name}.out.weight"] @ torch.cat(mixed))
    return added


def flamingo(features: list[Vector], w: Weights, layers: int, heads: int) -> list[Vector]:
    """At the width of the features, then a linear layer to the base's."""
    latents = list(w["latents"])
    for layer in range(layers):
        name = f"layers.{layer}"
        added = read(latents, features, w, name, heads, heads, layer_norm)
        latents = [x + y for x, y in zip(latents, added, strict=True)]
        norms = [layer_norm(x, w, f"{name}.norm") for x in latents]
        more = [plain(x, w, f"{name}.feedforward") for x in norms]
        latents = [x + y for x, y in zip(latents, more, strict=True)]
    out = [layer_norm(x, w, "norm") for x in latents]
    return [w["linear.weight"] @ x + w["linear.bias"] for x in out]


def idefics2(
    features: list[Vector], w: Weights, layers: int, heads: int, kv_heads: int
) -> list[Vector]:
    """A gated projection to the base's width first, at which all the rest works."""
    features = [gated(x, w, "before") for x in features]
    latents = list(w["latents"])
    for layer in range(layers):
        name = f"layers.{layer}"
        added = read(latents, features, w, name, heads, kv_heads, rms_norm)
        latents = [x + y for x, y in zip(latents, added, strict=True)]
        norms = [rms_norm(x, w, f"{name}.norm") for x in latents]
        more = [gated(x, w, f"{name}.feedforward") for x in norms]
        latents = [x + y for x, y in zip(latents, more, strict=True)]
    return [rms_norm(x, w, "norm") for x in latents]
