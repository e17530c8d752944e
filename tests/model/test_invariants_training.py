"""Invariant 5 by training: on targets drawn at random no model beats chance unless it sees ahead.

Every step and every measurement draws new tokens, uniform over ``V`` ids, so that there is nothing
to learn by heart: a model that reads only what came before cannot expect less than ln V nats for
the next one. One that sees a later position learns to copy it. The published Wings code falls to
0.001 that way.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grafting import (
    CONFIGS,
    HIDDEN,
    PATCHES,
    every_method,
    graft_on,
    image_count,
    trained_groups,
)
from mmgraft import GraftedModel
from mmgraft.anatomy import Anatomy
from mmgraft.grafts import Promises
from mmgraft.grafts.llava.graft import LlavaGraft
from mmgraft.published.wings.config import OfficialWingsConfig

IDS = 16
CHANCE = math.log(IDS)
MARGIN = 0.05
"""Above the noise of a mean over 4,000 tokens, far below what a leak gives."""

PLACES = {
    "first": "iiiitttttttttttt",
    "middle": "ttttttiiiitttttt",
    "last": "ttttttttttttiiii",
    "two": "ttiiiittttiiiitt",
}


def noise(places: list[str], each: int, seed: int) -> dict[str, Tensor]:
    """Random tokens and random images in every place, `each` rows of a place, with labels."""
    generator = torch.Generator().manual_seed(seed)
    words = [[int(letter == "i") for letter in PLACES[place]] for place in places]
    kinds = torch.tensor(words).repeat_interleave(each, dim=0)
    ids = torch.randint(0, IDS, kinds.shape, generator=generator)
    images = image_count(kinds)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "image_features": torch.randn(images, PATCHES, HIDDEN, generator=generator),
        "labels": ids.masked_fill(kinds == 1, -100),
    }


def trained_on_noise(model: GraftedModel, places: list[str], steps: int = 100) -> dict[str, float]:
    """Trains all that the graft may on noise, then measures."""
    model.set_trainable(trained_groups(model.workflow().graft.method))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    model.train()
    for step in range(steps):
        model(**noise(places, 4, seed=step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return measured(model, places)


@torch.no_grad()
def measured(model: GraftedModel, places: list[str]) -> dict[str, float]:
    """The loss on new noise for each place, in nats."""
    model.eval()
    return {place: model(**noise([place], 256, seed=10_000)).loss.item() for place in places}


def small(arch: str, config: Any) -> GraftedModel:
    return graft_on(arch, config, base={"vocab_size": IDS})


@pytest.mark.parametrize("arch", ["llama", "phi"])
@every_method
def test_no_method_beats_chance(arch: str, method: str) -> None:
    """Phi computes attention and feed-forward side by side."""
    model = small(arch, CONFIGS[method])
    before = measured(model, list(PLACES))
    after = trained_on_noise(model, list(PLACES))
    for place, loss in after.items():
        assert loss > CHANCE - MARGIN, place
        if place == "last" and not model.workflow().graft.promises.before:
            assert loss == before[place]  # nothing that is trained acts before an image
        else:
            assert loss < before[place] - 0.1, f"{place}: the training did nothing"


def test_the_same_training_finds_the_published_leak() -> None:
    """With the text in front of the image, its textual learner reads the token to be predicted."""
    config = OfficialWingsConfig(rank=16, system_prompt_length=2, image_token_length=4)
    model = small("llama", config)
    model.workflow().graft.promises = Promises()
    assert trained_on_noise(model, ["middle"])["middle"] < CHANCE - 0.5


class Leaky(LlavaGraft):
    """Adds to every position something of the next one."""

    def __init__(self, config: Any, anatomy: Anatomy) -> None:
        super().__init__(config, anatomy, None)
        self.ahead = nn.Linear(anatomy.hidden_size, anatomy.hidden_size)

    def acts_on(self, index: int) -> bool:
        return index == 2

    def after_layer(self, index, call, entered, left, state, carry):
        return left + self.ahead(entered.roll(-1, dims=1)), carry


@pytest.mark.parametrize("arch", ["llama", "phi"])
def test_the_same_training_finds_a_leak_in_every_place(arch: str) -> None:
    model = small(arch, CONFIGS["llava"])
    leaky = Leaky(CONFIGS["llava"], model.anatomy)
    model.workflow().graft = leaky.to(model.dtype)
    leaky.method = "leaky"
    leaky.promises = Promises()
    losses = trained_on_noise(model, list(PLACES))
    assert all(loss < CHANCE - 0.5 for loss in losses.values()), losses
