"""A Wings graft computed slowly: attention maps written out, logits of all positions, no cache.

That is what the published code does, here for the paper's form of the method, so that both sides of
a benchmark compute the same numbers with the same weights. It reads a grafted model with a Llama
base of equal learner and base heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import models
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmgraft import WingsConfig
from mmgraft.grafts.wings.graft import WingsLayer
from mmgraft.grafts.wings.learners import Learner
from mmgraft.model.modeling import GraftedModel
from mmgraft.vision.plan import Plan

LOWEST = torch.finfo(torch.float32).min


def wings(options: argparse.Namespace) -> GraftedModel:
    """A graft of rank 64 on a random base of `--layers` layers, every matrix away from zero."""
    base = models.base(options.vocab, num_hidden_layers=options.layers)
    model = models.grafted(base, WingsConfig(rank=64))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.workflow().graft.named_parameters():
            if ".up." in name or "router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
    return model


def shape_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of :func:`wings`: smaller shapes for a first try."""
    parser.add_argument("--layers", type=int, default=models.SHAPE["num_hidden_layers"])
    parser.add_argument("--vocab", type=int, default=models.VOCAB)
    return parser


def row_of(model: GraftedModel, length: int, rows: int = 1, answer: int = 64) -> dict[str, Tensor]:
    """Rows of so many positions: 576 of an image, a question, `answer` supervised ids."""
    before = length - models.IMAGE_TOKENS - answer
    return models.conversation(model, rows, before=before, answer=answer)


def explicit_logits(model: GraftedModel, batch: dict[str, Tensor]) -> Tensor:
    """Logits of all positions ``(b, s, vocab)`` of rows whose image stands first."""
    base = model.base
    embeds = base.get_input_embeddings()(batch["input_ids"])  # (b, s, h)
    image = batch["mm_token_type_ids"][0] == 1  # (s,) the same in all rows
    features = batch["image_features"]
    plans = [Plan.of_count(features.shape[1])] * len(features)
    projected = model.workflow().projector(features.flatten(0, 1), plans)
    places = (batch["mm_token_type_ids"] == 1)[..., None]
    features = embeds.masked_scatter(places, projected)
    length = features.shape[1]
    positions = torch.arange(length)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    mask = torch.zeros(length, length).masked_fill(later, LOWEST)[None, None]
    body, hidden = base.model, features
    rotary = body.rotary_emb(hidden, positions[None])
    with _explicit_attention(model):
        for index, layer in enumerate(body.layers):
            wing = model.workflow().graft.layers[str(index)]
            out, weights = layer.self_attn(
                hidden_states=layer.input_layernorm(hidden),
                position_embeddings=rotary,
                attention_mask=mask,
            )
            out = out + _learned(wing, hidden, features, image, positions, weights, model)
            hidden = hidden + out
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return base.lm_head(body.norm(hidden))


def explicit_loss(model: GraftedModel, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the supervised positions, from logits of all."""
    logits = explicit_logits(model, batch).float()
    before, after = logits[:, :-1].contiguous(), batch["labels"][:, 1:].contiguous()
    return F.cross_entropy(before.view(-1, before.shape[-1]), after.view(-1))


def _learned(
    wing: WingsLayer,
    hidden: Tensor,
    features: Tensor,
    image: Tensor,
    positions: Tensor,
    weights: Tensor,
    model: GraftedModel,
) -> Tensor:
    columns = wing.router.weight[:, : len(positions)]  # (2, s)
    shares = (weights.float().sum(1) @ columns.t()).softmax(-1)  # (b, s, 2)
    theta = model.anatomy.rope_theta
    assert theta is not None
    total = torch.zeros_like(hidden)
    for number, name in enumerate(("visual", "textual")):
        keys = image if name == "visual" else ~image
        added = _one_learner(wing.get_submodule(name), hidden, features, keys, positions, theta)
        total = total + shares[..., number, None] * added
    return total


def _one_learner(
    learner: Learner,
    hidden: Tensor,
    features: Tensor,
    own: Tensor,
    positions: Tensor,
    theta: float,
) -> Tensor:
    """One learner's output ``(b, s, h)`` by a map of ``s x K`` a head."""
    x = features[:, own]  # (b, K, h)
    query = _rotated(_heads(hidden + learner.query(hidden), learner.heads), positions, theta)
    key = _rotated(_heads(x + learner.key(x), learner.heads), positions[own], theta)
    value = _heads(x + learner.value(x), learner.heads)
    seen = positions[own][None, :] <= positions[:, None]  # (s, K)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    scores = scores + torch.zeros(seen.shape).masked_fill(~seen, LOWEST)
    mixed = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    out = learner.output(mixed.transpose(1, 2).flatten(2))
    return out * seen.any(-1)[None, :, None]


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    size = x.shape[-1]
    angles = positions[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)  # (s, d)
    turned = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1)
    return x * cos + turned * sin


@contextmanager
def _explicit_attention(model: GraftedModel) -> Iterator[None]:
    config = model.base.config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def trained_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of what is trained, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
