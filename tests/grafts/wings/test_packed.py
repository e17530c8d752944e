"""Without a cache a learner reads only the keys of its kind: same result, same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grafting import batch, graft_on, perturb, rows
from mmgraft import GraftedModel, WingsConfig
from mmgraft.grafts.base import IMAGE, TEXT

WORDS = ("ttiiiittiiiittt", "tttttttiiiit", "iiiittttt", "tttt")


def trained(model: GraftedModel) -> dict[str, Tensor]:
    graft = model.workflow().graft
    return {name: p.grad.clone() for name, p in graft.named_parameters() if p.grad is not None}


def step(
    model: GraftedModel, side: str, *, packed: bool, checkpointing: bool
) -> tuple[Tensor, dict]:
    made = rows(*WORDS)
    inputs = batch(made, side)
    graft = model.workflow().graft
    # A watched graft computes every key, so that positions stay what they are.
    graft.watch = None if packed else lambda *seen: None
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_disable()
    logits = model(**inputs, workflow="mm", use_cache=False).logits
    kept = logits[inputs["attention_mask"].bool()]
    kept.log_softmax(-1)[:, 5].sum().backward()
    return kept.detach(), trained(model)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_keys_change_neither_outputs_nor_gradients(arch: str, side: str) -> None:
    """Rows with no image, one and two; a mask that forgot causality or took a filler would show."""
    model = perturb(graft_on(arch, WingsConfig(rank=4)))
    model.set_trainable(["graft"])
    model.train()
    whole, grads = step(model, side, packed=False, checkpointing=False)
    for checkpointing in (False, True):
        short, others = step(model, side, packed=True, checkpointing=checkpointing)
        torch.testing.assert_close(short, whole, atol=2e-5, rtol=1e-4)
        assert others.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(others[name], grad, atol=1e-4, rtol=1e-3, msg=name)


def test_what_is_packed_is_as_wide_as_the_longest_row_needs() -> None:
    model = perturb(graft_on("llama", WingsConfig(rank=4)))
    inputs = batch(rows(*WORDS), "right")
    seen = []
    graft = model.workflow().graft
    original = graft.begin
    graft.begin = lambda state: (original(state), seen.append(state))  # type: ignore[method-assign]
    with torch.no_grad():
        model(**inputs, workflow="mm", use_cache=False)
        cache = model(**inputs, workflow="mm", use_cache=True).past_key_values
        more = torch.cat([inputs["attention_mask"], torch.ones(4, 1, dtype=torch.long)], dim=1)
        model(torch.full((4, 1), 7), attention_mask=more, past_key_values=cache)
    for state in seen[:2]:
        widths = {kind: one.features.shape[1] for kind, one in state.packed.items()}
        assert widths == {IMAGE: 8, TEXT: 8}
    assert seen[2].packed == {}  # a cache holds every position, whatever its kind
