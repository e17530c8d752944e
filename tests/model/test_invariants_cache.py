"""Invariant 3: decoding from a cache equals the full forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from decoding import WORDS, differences, in_chunks, placed, worst
from grafting import (
    CONFIGS,
    batch,
    distance,
    every_architecture,
    every_pair,
    graft_on,
    grafted,
    logits_of,
    perturb,
    plain,
    rows,
    takes,
    text_of,
)
from tiny import VARIANTS


@every_pair
def test_chunks_and_single_tokens_equal_the_full_forward(arch: str, method: str) -> None:
    """Unequal rows with and without images in one batch, padded on the left."""
    assert worst(grafted(arch, method), batch(rows(*WORDS), "left")) < 1e-5


@pytest.mark.parametrize("arch", VARIANTS)
def test_other_forms_of_the_classes(arch: str) -> None:
    """Windows in other places, alibi, sequential blocks, a projected embedding."""
    for method in ("iaa-c", "wings", "lora"):
        inputs = batch(rows(*WORDS), "left")
        if arch == "opt_post_norm":
            config = CONFIGS["llava"] if method == "wings" else _no_norm()
            model = perturb(graft_on(arch, config))
            inputs["image_features"] = inputs["image_features"][..., :24]
        else:
            model = grafted(arch, method)
        assert worst(model, inputs) < 1e-5, method


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_rows_without_any_image_that_run_a_workflow(arch: str, method: str) -> None:
    """The textual learner of Wings is alone there, with its own share of two."""
    inputs = text_of(batch(rows("t" * 19, "t" * 13), "left"))
    assert worst(grafted(arch, method), inputs, workflow="mm") < 1e-5


@pytest.mark.parametrize("method", CONFIGS)
def test_weights_that_change_between_two_prompts_are_seen(method: str) -> None:
    """Wings puts matrices side by side once a generation."""
    model = perturb(graft_on("llama", CONFIGS[method])).double()
    inputs = batch(rows(*WORDS), "left")
    before = in_chunks(model, inputs)
    perturb(model, seed=2)
    after = in_chunks(model, inputs)
    real = inputs["attention_mask"].bool()
    assert distance(after[real], logits_of(model, inputs)[real]) < 1e-6  # Wings' router is fp32
    assert distance(after[real], before[real]) > 1e-3


def _no_norm() -> Any:
    return CONFIGS["iaa-c"].model_copy(update={"norm": False})


def batches() -> list[dict[str, Tensor]]:
    return [batch(rows(*WORDS, seed=seed), "left") for seed in (0, 1, 2)]


@every_architecture
def test_in_bf16_it_is_as_close_as_the_bases_own_cache(arch: str) -> None:
    """Kernels round by the shape of what they get, so a base differs from itself when it decodes.

    A graft may differ twice as much: it has up to twice as many attentions in its path (learners,
    inserted layers). Where the base does not differ at all (explicit attention rounds each query by
    itself, but learners are fused), the yardstick is how far bf16 takes it from fp32. Medians over
    positions, for a rounding can send a token to another expert, in the base as in a graft.
    """
    base, exact = plain(arch, torch.bfloat16), plain(arch)
    texts = [text_of(each) for each in batches()]
    own = torch.cat([differences(base, each) for each in texts]).median()
    rounding = []
    for each in texts:
        real, given = each["attention_mask"].bool(), placed(base, each)
        moved = logits_of(base, given)[real].float() - logits_of(exact, given)[real]
        rounding.append(moved.abs().amax(-1))
    allowed = max(2 * own, torch.cat(rounding).median())
    assert allowed < 0.1
    for method in CONFIGS:
        takes(method)
        model = grafted(arch, method, torch.bfloat16)
        found = torch.cat([differences(model, each) for each in batches()])
        assert found.median() <= allowed, method


def test_a_wrong_position_is_far_beyond_what_bf16_allows() -> None:
    """The median above sees a mistake: here the padding of the cached steps is forgotten."""
    model, inputs = grafted("llama", "iaa-c", torch.bfloat16), batches()[0]
    wrong = dict(inputs)
    wrong["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    real = inputs["attention_mask"].bool()
    moved = in_chunks(model, wrong)[real].float() - logits_of(model, inputs)[real].float()
    assert moved.abs().amax(-1).median() > 0.5
