"""Invariant 4: what a row gives depends on no neighbour and on no padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grafting import (
    CONFIGS,
    batch,
    distance,
    every_architecture,
    every_pair,
    graft_on,
    grafted,
    logits_of,
    own,
    perturb,
    plain,
    rows,
    text_of,
    together,
)
from mmgraft import GraftedModel
from tiny import tiny_tower

# No image, one, two side by side, two apart, and no image in the graft's own workflow.
WORDS = ("tttttttt", "ttttiiiittttttttt", "tiiiiiiiit", "iiiittiiiittttt", "ttttttttttt")
WORKFLOWS = ["text", "mm", "mm", "mm", "mm"]


def alone(model: GraftedModel, words: tuple[str, ...], workflows: list[str]) -> list[Tensor]:
    return [
        logits_of(model, batch([each]), workflow=workflow)[0]
        for each, workflow in zip(rows(*words), workflows, strict=True)
    ]


@every_pair
def test_neighbours_and_padding_do_not_matter(arch: str, method: str) -> None:
    model = grafted(arch, method)
    expected = alone(model, WORDS, WORKFLOWS)
    for side in ("left", "right"):
        inputs = batch(rows(*WORDS), side, length=20)
        found = own(logits_of(model, inputs, workflow=WORKFLOWS), inputs)
        for mine, wanted in zip(found, expected, strict=True):
            assert distance(mine, wanted) < 1e-5


@every_architecture
def test_rows_of_several_workflows_and_text_share_a_batch(arch: str) -> None:
    """Three grafts of three methods and the base at once: own embeddings, norms and heads too."""
    made = {
        name: perturb(graft_on(arch, CONFIGS[method], workflow=name), seed=seed)
        for seed, (name, method) in enumerate(
            [("mm", "iaa-c"), ("grounding", "lora"), ("winged", "wings")]
        )
    }
    model = together(*made.values())
    words = ("ttiiiittt", "tttttttttttt", "iiiittiiiit", "tttiiiitttttttt", "ttiiiittttt")
    names = ["mm", "text", "grounding", "winged", "mm"]
    expected = [
        logits_of(plain(arch), text_of(batch([each])))[0]
        if name == "text"
        else logits_of(made[name], batch([each]), workflow=name)[0]
        for each, name in zip(rows(*words), names, strict=True)
    ]
    for side in ("left", "right"):
        inputs = batch(rows(*words), side)
        found = own(logits_of(model, inputs, workflow=names), inputs)
        for mine, wanted, name in zip(found, expected, names, strict=True):
            assert distance(mine, wanted) < 1e-5, name
    swapped = ["grounding", "text", "mm", "winged", "mm"]
    other = own(logits_of(model, inputs, workflow=swapped), inputs)
    assert distance(other[0], expected[0]) > 1e-2


@pytest.mark.parametrize("method", ["iaa-c", "wings", "xattn"])
def test_the_content_of_padding_does_not_matter(method: str) -> None:
    model = grafted("llama", method)
    for side in ("left", "right"):
        inputs = batch(rows(*WORDS), side, length=20)
        expected = own(logits_of(model, inputs), inputs)
        padding = inputs["attention_mask"] == 0
        filled = {**inputs, "input_ids": inputs["input_ids"].masked_fill(padding, 77)}
        for mine, wanted in zip(own(logits_of(model, filled), inputs), expected, strict=True):
            assert distance(mine, wanted) < 1e-5


@pytest.mark.parametrize("method", ["iaa-c", "wings", "llava", "lora-token", "xattn"])
def test_ids_at_image_positions_do_not_matter(method: str) -> None:
    model = grafted("llama", method)
    inputs = batch(rows("ttiiiitttt"))
    image = inputs["mm_token_type_ids"] == 1
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(image, 5)}
    assert torch.equal(logits_of(model, inputs), logits_of(model, other))


def test_each_image_goes_to_its_own_row() -> None:
    model = grafted("llama", "iaa-c")
    inputs = batch(rows("iiiittiiiitt", "ttiiiitttttt"))
    expected = logits_of(model, inputs)
    for moved, changes in [(0, (0,)), (1, (0,)), (2, (1,))]:
        features = inputs["image_features"].clone()
        features[moved] += 1.0
        found = logits_of(model, {**inputs, "image_features": features})
        for number in (0, 1):
            same = torch.equal(found[number], expected[number])
            assert same == (number not in changes)


def test_pixels_are_the_features_of_the_tower() -> None:
    from tiny import tiny_model

    model = GraftedModel.graft(tiny_model("llama"), tiny_tower(), CONFIGS["iaa-c"])
    inputs = batch(rows("iiiitt", "ttiiiittt"), "left")
    pixels = torch.randn(2, 3, *model.vision_tower.image_size)
    with torch.no_grad():
        features = model.vision_tower(pixels)
    assert features.shape == (2, 4, 16)
    inputs.pop("image_features")
    seen = logits_of(model, {**inputs, "pixel_values": pixels})
    assert torch.equal(seen, logits_of(model, {**inputs, "image_features": features}))
    twisted = {**inputs, "pixel_values": pixels.flip(0)}
    assert distance(seen, logits_of(model, twisted)) > 1e-3
