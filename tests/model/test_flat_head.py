from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grafting import batch, distance, graft_on, logits_of, perturb, rows
from mmgraft import IAAConfig, LlavaConfig
from mmgraft.evaluation.generate.answers import flat_heads

WORDS = ("ttiiiitt", "tiiiittt", "ttttiiii")


@pytest.mark.parametrize(
    "config", [IAAConfig(layers=[1]), IAAConfig(layers=[1], head=False), LlavaConfig()]
)
def test_heads_read_a_matrix_and_say_the_same(config, monkeypatch) -> None:
    """The base's head and a workflow's own; with the last position alone, as `generate` asks."""
    model = perturb(graft_on("llama", config))
    inputs = batch(rows(*WORDS), "left")
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def watched(given: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        if weight.shape[0] == model.base.config.vocab_size:
            seen.append(given.dim())
        return linear(given, weight, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    for options in ({}, {"logits_to_keep": 1}):
        plain = logits_of(model, inputs, **options)
        with flat_heads(model):
            flat = logits_of(model, inputs, **options)
        assert flat.shape == plain.shape
        assert distance(flat, plain) < 1e-5
    assert seen == [3, 2, 3, 2]
    assert logits_of(model, inputs, logits_to_keep=1).shape[1] == 1
    assert seen[-1] == 3, "outside of the block a head is as it was"
