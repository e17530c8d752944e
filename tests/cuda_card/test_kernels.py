"""Check how many kernels a decoded token starts, and the copies of matrices that keep them few."""

from __future__ import annotations

from typing import Any

import torch

from grafting import CONFIGS, batch, graft_on, perturb, rows
from mmgraft import GraftedModel
from pretend_cuda import CARD, Card

ROWS = rows("ttiiiitt", "tiiiittt")
OF_WINGS = 1.75  # in those of LLaVA


def generate(model: GraftedModel, tokens: int, **more: Any) -> torch.Tensor:
    inputs = {name: tensor.to(model.device) for name, tensor in batch(ROWS, "left").items()}
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return model.generate(**inputs, **length, do_sample=False, pad_token_id=0, **more)


def test_kernels_of_a_token(card: Card) -> None:
    started = {}
    for method in ("llava", "wings"):
        model = perturb(graft_on("llama", CONFIGS[method], base={"num_hidden_layers": 8})).to(CARD)
        seen = []
        for tokens in (2, 4):
            with card.counting() as counted:
                generate(model, tokens)
            seen.append(counted.started)
        started[method] = (seen[1] - seen[0]) / 2
    assert started["wings"] <= OF_WINGS * started["llava"], started


def test_other_weights_give_other_tokens() -> None:
    """No copy of a matrix outlives the generation that it was made for."""
    model = perturb(graft_on("llama", CONFIGS["wings"]))
    before = generate(model, 6)
    perturb(model, size=0.5, seed=3)
    after = generate(model, 6)
    assert not torch.equal(after, before)
    assert any(wing.stacked for wing in model.workflow().graft.layers.values())
    assert torch.equal(after, generate(model, 6, use_cache=False))
    generate(model, 3)
    model.train()
    assert not any(wing.stacked for wing in model.workflow().graft.layers.values())
