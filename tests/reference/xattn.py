"""Gated cross-attention, slowly: each position reads its images one vector after another.

There is no mask: a position is given the images that stand at or before it, and where there are
none it is left alone. Nothing of mmgraft or transformers is used.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from reference.decoder import State, causal_mask, decoder_layer, rms_norm

EPS = 1e-6


def norm(block: State, name: str, x: Tensor) -> Tensor:
    """A block's norm of one vector: a LayerNorm where it has a bias, none without a weight."""
    weight, bias = block.get(f"{name}.weight"), block.get(f"{name}.bias")
    if weight is None:
        return x
    if bias is not None:
        x = x - x.mean()
        return x / torch.sqrt(x.square().mean() + EPS) * weight + bias
    return rms_norm(x, weight, EPS)


def read(block: State, x: Tensor, vectors: Sequence[Tensor], width: int) -> Tensor:
    """Return what one position (h,) reads of vectors (h,); query heads share key heads evenly."""
    query = block["attention.query.weight"] @ norm(block, "attention.norm", x)
    keys = [block["attention.key.weight"] @ vector for vector in vectors]
    values = [block["attention.value.weight"] @ vector for vector in vectors]
    heads, groups = len(query) // width, len(keys[0]) // width
    mixed = []
    for head in range(heads):
        group = head * groups // heads
        own, theirs = (slice(n * width, (n + 1) * width) for n in (head, group))
        q = norm(block, "attention.query_norm", query[own])
        scores = [
            q @ norm(block, "attention.key_norm", key[theirs]) / math.sqrt(width) for key in keys
        ]
        weights = [torch.exp(score) for score in scores]
        total = torch.stack(weights).sum()
        parts = [w / total * v[theirs] for w, v in zip(weights, values, strict=True)]
        mixed.append(torch.stack(parts).sum(0))
    return block["attention.output.weight"] @ torch.cat(mixed)


def opening(block: State, half: str, linear: bool) -> Tensor:
    """The factor of what a half adds."""
    gate = block[f"{half}.gate"]
    return gate if linear else torch.tanh(gate)


def block_of(
    block: State, x: Tensor, vectors: Sequence[Tensor], width: int, linear: bool
) -> Tensor:
    """One position (h,) through a block."""
    if not vectors:
        return x
    x = x + opening(block, "attention", linear) * read(block, x, vectors, width)
    if "feedforward.up.weight" not in block:
        return x
    normed = norm(block, "feedforward.norm", x)
    inner = block["feedforward.up.weight"] @ normed
    if "feedforward.swish.weight" in block:
        inner = functional.silu(block["feedforward.swish.weight"] @ normed) * inner
    else:
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return x + opening(block, "feedforward", linear) * (block["feedforward.down.weight"] @ inner)


def seen(images: Mapping[int, Tensor], position: int, latest: bool) -> list[Tensor]:
    """The vectors of the images that a position sees, which stand at the keys of `images`."""
    before = [vectors for at, vectors in sorted(images.items()) if at <= position]
    if latest:
        before = before[-1:]
    return [vector for vectors in before for vector in vectors]


def xattn_reference(
    state: State,
    blocks: Mapping[int, State],
    config: Mapping,
    x: Tensor,
    images: Mapping[int, Tensor],
    width: int,
    latest: bool = False,
    linear: bool = False,
) -> Tensor:
    """The logits (s, vocab) of one unpadded row through a Llama with blocks.

    Args:
        state: the base, by its own names.
        blocks: base layer -> the tensors of the block behind it.
        config: the base's config.
        x: (s, h) token embeddings, the marker at image positions.
        images: position -> the vectors (P, h) of the image that stands there.
        width: of a head of the blocks.
        latest: a position sees the last image before it alone.
        linear: gates are factors, without a tanh.
    """
    mask = causal_mask(len(x))
    for index in range(config["num_hidden_layers"]):
        x = decoder_layer(state, f"model.layers.{index}", x, config, mask)
        if index in blocks:
            x = torch.stack(
                [
                    block_of(blocks[index], row, seen(images, at, latest), width, linear)
                    for at, row in enumerate(x)
                ]
            )
    return (
        rms_norm(x, state["model.norm.weight"], config["rms_norm_eps"]) @ state["lm_head.weight"].T
    )
