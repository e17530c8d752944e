"""Grafted tiny models, and rows of text and pictures written as words of t and i.

A model comes from :func:`grafted` (noise on every tensor of the workflow, as if it were trained) or
:func:`fresh`. Both are kept for a while and shared: no test may change them. A row is a word,
``"ttiiiit"``: two text tokens, one image of four patches, one text token.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel

from mmgraft import (
    ExpertConfig,
    GraftedModel,
    IAAConfig,
    LlavaConfig,
    LoraConfig,
    WingsConfig,
    XattnConfig,
)
from mmgraft.model.loss import supervised
from mmgraft.vision.plan import Plan
from tiny import ARCHITECTURES, HIDDEN, tiny_model

PATCHES = 4
"""Vectors of one image, and its positions but for :data:`BESIDE`."""

CONFIGS: dict[str, BaseModel] = {
    "iaa-a": IAAConfig(layers=[0, 2], structure="a"),
    "iaa-b": IAAConfig(layers=[1, 2], structure="b"),
    "iaa-c": IAAConfig(layers=[0, 3]),
    "wings": WingsConfig(rank=4),
    "llava": LlavaConfig(),
    "lora": LoraConfig(rank=4, alpha=6.0),
    "lora-token": LoraConfig(rank=3, alpha=3.0, gate="token"),
    "expert": ExpertConfig(),
    "xattn": XattnConfig(layers=[0, 2], gate_size="channel"),
}
"""The methods of the matrix. Inserted layers follow sliding and full layers, the last one too."""

BESIDE = {"xattn"}
"""Methods of which an image takes one position: in their tests every i of a word is an image."""

_takes = [PATCHES]


def takes(method: str | None) -> None:
    """Rows are made for this method from now on; conftest.py says so for tests of a method."""
    _takes[0] = 1 if method in BESIDE else PATCHES


def taken() -> int:
    """Positions of an image."""
    return _takes[0]


def image_count(kinds: Tensor) -> int:
    """Images that stand at these positions."""
    return int((kinds == 1).sum()) // taken()


MATRIX = [(arch, method) for arch in ARCHITECTURES for method in CONFIGS]

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)
every_method = pytest.mark.parametrize("method", CONFIGS)
every_pair = pytest.mark.parametrize(("arch", "method"), MATRIX)

MIXTURES = {"qwen3_moe", "mixtral", "gpt_oss"}
"""Their experts compute all tokens of a batch in one product, whose rounding depends on it."""


KEPT = 24
"""Models of each kind that are kept: a test takes them one architecture after another, and all of
them would be a quarter of what a worker may hold."""


@lru_cache(KEPT)
def plain(arch: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The base by itself, built apart from every grafted one: same weights, no mmgraft."""
    return tiny_model(arch, dtype=dtype)


@lru_cache(KEPT)
def fresh(arch: str, method: str) -> GraftedModel:
    """A graft as it is made, in fp32."""
    return graft_on(arch, CONFIGS[method])


@lru_cache(KEPT)
def grafted(arch: str, method: str, dtype: torch.dtype = torch.float32) -> GraftedModel:
    """A graft as if it were trained."""
    return perturb(graft_on(arch, CONFIGS[method], dtype=dtype))


def graft_on(
    arch: str,
    config: BaseModel,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    workflow: str = "mm",
    base: Mapping[str, Any] | None = None,
) -> GraftedModel:
    """A model of its own, which a test may change."""
    given = {} if attention is None else {"attn_implementation": attention}
    model = tiny_model(arch, dtype=dtype, **given, **(base or {}))
    assert attention in (None, model.config._attn_implementation)
    torch.manual_seed(zlib.crc32(arch.encode()))
    return GraftedModel.graft(model, None, config, workflow=workflow)


@torch.no_grad()
def perturb(model: GraftedModel, size: float = 0.1, seed: int = 1) -> GraftedModel:
    """Moves every tensor of the workflows: gates open, learners speak, the router prefers."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.workflows.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        wide = "router" in name or name.endswith(".gate")
        scale = 1.0 if wide else size * (3 if ".up." in name else 1)
        parameter.add_((noise * scale).to(parameter))
    return model


def together(*models: GraftedModel) -> GraftedModel:
    """One model with the workflows of several, on the first one's base (all bases are equal)."""
    return GraftedModel(models[0].base, None, [model.workflow() for model in models])


@dataclass(frozen=True)
class Row:
    """One conversation: `kinds (s,)` 0 text and 1 image, `ids (s,)`, `features (images, P, v)`."""

    kinds: Tensor
    ids: Tensor
    features: Tensor

    def __len__(self) -> int:
        return len(self.kinds)


def row(word: str, seed: int = 0, vocab: int = 300, width: int = HIDDEN) -> Row:
    """A row of random content; the same word and seed give the same row, in any batch."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{word}/{seed}".encode()))
    kinds = torch.tensor([int(letter == "i") for letter in word])
    ids = torch.randint(6, vocab, kinds.shape, generator=generator)
    images, rest = divmod(int(kinds.sum()), taken())
    assert not rest, f"an image has {taken()} positions"
    return Row(kinds, ids, torch.randn(images, PATCHES, width, generator=generator))


def rows(*words: str, seed: int = 0) -> list[Row]:
    """Rows of these words, each with content of its own."""
    return [row(word, seed + 100 * number) for number, word in enumerate(words)]


def batch(rows: Sequence[Row], side: str = "right", length: int | None = None) -> dict[str, Tensor]:
    """Inputs of the forward, padded on one side to the longest row (or to `length`)."""
    length = length or max(map(len, rows))

    def padded(tensors: Sequence[Tensor]) -> Tensor:
        gaps = [(0, length - len(t)) if side == "right" else (length - len(t), 0) for t in tensors]
        return torch.stack(
            [torch.nn.functional.pad(t, gap) for t, gap in zip(tensors, gaps, strict=True)]
        )

    made = {
        "input_ids": padded([r.ids for r in rows]),
        "attention_mask": padded([torch.ones_like(r.ids) for r in rows]),
    }
    features = torch.cat([r.features for r in rows])
    if len(features):
        made["mm_token_type_ids"] = padded([r.kinds for r in rows])
        made["image_features"] = features
    return made


def project(model: GraftedModel, features: Tensor, workflow: str | None = None) -> Tensor:
    """Features `(images, P, v)` as the model's projector makes them, `(images, P, h)`."""
    plans = [Plan.of_count(features.shape[1])] * len(features)
    made = model.workflow(workflow).projector(features.flatten(0, 1), plans)
    return made.unflatten(0, features.shape[:2])


def text_of(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a base takes of a batch."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def logits_of(model: Any, inputs: Mapping[str, Any], **options: Any) -> Tensor:
    """Logits ``(b, s, vocab)`` of one full forward without a cache."""
    return model(**inputs, use_cache=False, **options).logits


def own(logits: Tensor, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Each row's logits at its own positions, padding left out."""
    return [each[real.bool()] for each, real in zip(logits, inputs["attention_mask"], strict=True)]


def distance(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference."""
    assert one.shape == other.shape
    return (one.float() - other.float()).abs().max().item()


def text_labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """Labels that teach every text token, ``(b, s)``."""
    kinds = inputs.get("mm_token_type_ids", torch.zeros_like(inputs["input_ids"]))
    learned = (inputs["attention_mask"] == 1) & (kinds == 0)
    return inputs["input_ids"].masked_fill(~learned, -100)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy from logits of all positions, the plain way."""
    mask = supervised(labels)
    return torch.nn.functional.cross_entropy(logits[mask].float(), labels.roll(-1, dims=1)[mask])


def trained_groups(method: str) -> list[str]:
    """Everything that a method may train with a frozen base."""
    return ["projector"] if method == "llava" else ["projector", "graft"]
