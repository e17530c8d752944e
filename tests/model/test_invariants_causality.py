"""Invariant 5: no position sees a later one, by perturbation."""

from __future__ import annotations

import pytest

from decoding import changed_at
from grafting import (
    CONFIGS,
    MIXTURES,
    PATCHES,
    batch,
    every_pair,
    graft_on,
    grafted,
    logits_of,
    perturb,
    rows,
)
from mmgraft.published.wings.config import OfficialWingsConfig
from tiny import VARIANTS

# The image first, in the middle, last; two images.
WORDS = ("iiiitttttttttttt", "ttttttiiiitttttt", "ttttttttttttiiii", "ttiiiittttiiiitt")


def leak(model, column: int) -> tuple[float, float]:
    """Measure how far logits before a changed column move, and the least move from it on."""
    inputs = batch(rows(*WORDS))
    moved = (logits_of(model, inputs) - logits_of(model, changed_at(inputs, column))).abs()
    return moved[:, :column].max().item(), moved[:, column:].amax(dim=(1, 2)).min().item()


@every_pair
def test_a_change_moves_nothing_before_it(arch: str, method: str) -> None:
    """Exactly nothing, but for the rounding of experts that compute all tokens in one product."""
    allowed = 1e-5 if arch in MIXTURES else 0.0
    for column in (4, 8, 14):
        before, after = leak(grafted(arch, method), column)
        assert before <= allowed, column
        assert after > 1e-3, column


@pytest.mark.parametrize("arch", [name for name in VARIANTS if name != "opt_post_norm"])
def test_other_forms_of_the_classes(arch: str) -> None:
    """All but the form of OPT that embeds in another width, which Wings refuses."""
    allowed = 1e-5 if "moe" in arch else 0.0
    before, after = leak(grafted(arch, "wings"), 8)
    assert before <= allowed
    assert after > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("method", ["iaa-c", "wings"])
def test_every_column_under_both_attention_implementations(method: str, attention: str) -> None:
    model = perturb(graft_on("llama", CONFIGS[method], attention=attention))
    for column in range(1, len(WORDS[0])):
        before, after = leak(model, column)
        assert before == 0.0, column
        assert after > 1e-3, column


def test_the_perturbation_finds_the_published_leak() -> None:
    """The official variant's textual learner looks ahead; the same look at it says so."""
    config = OfficialWingsConfig(rank=4, system_prompt_length=2, image_token_length=4)
    model = perturb(graft_on("llama", config))
    inputs = batch(rows("ttttttiiiitttttt"))
    moved = (logits_of(model, inputs) - logits_of(model, changed_at(inputs, 12))).abs()
    assert moved[:, :12].max() > 1e-3
    # It sees as far ahead as the system prompt and the image are long.
    assert moved[:, : 12 - 2 - PATCHES].max() == 0.0
