"""The official variant in a model: what it lacks is there to be found, and is told."""

from __future__ import annotations

import pytest
import torch

from grafting import batch, distance, graft_on, logits_of, own, perturb, plain, rows, text_of
from mmgraft import GraftedModel, WingsConfig
from mmgraft.errors import UsageError
from mmgraft.published.wings.config import OfficialWingsConfig
from mmgraft.published.wings.graft import OfficialWingsGraft

OFFICIAL = OfficialWingsConfig(rank=4, system_prompt_length=2, image_token_length=4)
PAPER = WingsConfig(rank=4)


def pair() -> tuple[GraftedModel, GraftedModel]:
    return perturb(graft_on("llama", OFFICIAL)), perturb(graft_on("llama", PAPER))


def test_it_lacks_invariants_that_the_paper_form_keeps() -> None:
    official, paper = pair()
    assert isinstance(official.workflow().graft, OfficialWingsGraft)
    inputs = batch(rows("tttttiiiittttt"))
    later = dict(inputs, input_ids=inputs["input_ids"].clone())
    later["input_ids"][0, 12] += 1
    moved = [distance(*(logits_of(m, i)[:, :12] for i in (inputs, later))) for m in pair()]
    assert moved[0] > 1e-3
    assert moved[1] == 0.0

    both = batch(rows("tttttiiiittttt", "iiiitttttttttt"))
    moved = [
        distance(own(logits_of(m, both), both)[0], logits_of(m, inputs)[0])
        for m in (official, paper)
    ]
    assert moved[0] > 1e-3
    assert moved[1] < 1e-5

    texts = text_of(batch(rows("tttttttt")))
    asked = logits_of(official, texts, workflow="mm")
    assert distance(asked, logits_of(plain("llama"), texts)) > 1e-3
    assert torch.equal(logits_of(official, texts), logits_of(plain("llama"), texts))


def test_what_it_cannot_do_is_refused() -> None:
    official, _ = pair()
    inputs = batch(rows("tttttiiiittttt"))
    with pytest.raises(UsageError, match="use_cache=False"):
        official(**inputs, use_cache=True)
    with pytest.raises(UsageError, match="right-padded"):
        logits_of(official, batch(rows("tttttiiiittttt", "tttiiiitt"), "left"))
    with pytest.raises(UsageError, match="every row runs this workflow"):
        logits_of(official, batch(rows("tttttiiiittttt", "tttttttttt")))
    with pytest.raises(UsageError, match="one image a row"):
        logits_of(official, batch(rows("tiiiittiiiit")))
    with pytest.raises(UsageError, match="--method wings"):
        official.set_trainable(["graft"])


def test_a_row_without_an_image_takes_a_dummy_one() -> None:
    """As the published code gives a black image to it: an image of no positions in that row."""
    official, _ = pair()
    inputs = batch(rows("tttttiiiittttt", "tttttttttttttt"))
    dummy = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(3))
    given = {**inputs, "image_features": torch.cat([inputs["image_features"], dummy])}
    given |= {"image_rows": torch.arange(2), "image_lengths": torch.tensor([4, 0])}
    found = logits_of(official, given, workflow="mm")
    given["image_features"] = torch.cat([inputs["image_features"], dummy + 1])
    assert torch.equal(logits_of(official, given, workflow="mm")[0], found[0])
