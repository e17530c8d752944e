"""Invariant 3: decoding from a cache equals the full forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grafting import (
    CONFIGS,
    batch,
    distance,
    every_pair,
    graft_on,
    grafted,
    logits_of,
    perturb,
    rows,
)
from mmgraft import GraftedModel
from tiny import VARIANTS

# Left-padded to 19: two images, the second one in the second chunk; one image; no image at all.
WORDS = ("ttiiiitttiiiittt", "ttttiiiittttttttttt", "ttttttttttttt")
CHUNKS = (12, 16, 17, 18, 19)  # three columns of text, a chunk of one image, then single tokens


@torch.no_grad()
def in_chunks(
    model: Any, inputs: dict[str, Tensor], ends: tuple[int, ...] = CHUNKS, cache: Any = None
) -> Tensor:
    """Logits of all positions, from one cache that is filled chunk by chunk."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    kinds = inputs.get("mm_token_type_ids")
    features, logits, start, cached = inputs.get("image_features"), [], 0, cache
    owners: list[tuple[int, int]] = []  # row and last column of each image
    if kinds is not None:
        for number, line in enumerate(kinds):
            owners += [(number, int(at)) for at in line.nonzero().flatten()[3::4]]
    for end in ends:
        given = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        if kinds is not None and kinds[:, start:end].any():
            shown = [n for n, (_, last) in enumerate(owners) if start <= last < end]
            given["mm_token_type_ids"] = kinds[:, start:end]
            given["image_features"] = features[shown]
        if not isinstance(model, GraftedModel):
            positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)
            given["position_ids"] = positions[:, start:]
        out = model(**given, past_key_values=cached, use_cache=True)
        cached = out.past_key_values
        logits.append(out.logits)
        start = end
    return torch.cat(logits, dim=1)


def worst(model: Any, inputs: dict[str, Tensor], **options: Any) -> float:
    """Largest difference between cached decoding and the full forward at real positions."""
    real = inputs["attention_mask"].bool()
    given = inputs
    if not isinstance(model, GraftedModel):
        given = {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    return distance(in_chunks(model, inputs, **options)[real], logits_of(model, given)[real])


@every_pair
def test_chunks_and_single_tokens_equal_the_full_forward(arch: str, method: str) -> None:
    """Unequal rows with and without images in one batch, padded on the left."""
    assert worst(grafted(arch, method), batch(rows(*WORDS), "left")) < 1e-5


@pytest.mark.parametrize("arch", VARIANTS)
def test_other_forms_of_the_classes(arch: str) -> None:
    """Windows in other places, alibi, sequential blocks, a projected embedding."""
    for method in ("iaa-c", "wings"):
        inputs = batch(rows(*WORDS), "left")
        if arch == "opt_post_norm":
            config = CONFIGS["llava"] if method == "wings" else _no_norm()
            model = perturb(graft_on(arch, config))
            inputs["image_features"] = inputs["image_features"][..., :24]
        else:
            model = grafted(arch, method)
        assert worst(model, inputs) < 1e-5, method


def _no_norm() -> Any:
    return CONFIGS["iaa-c"].model_copy(update={"norm": False})
