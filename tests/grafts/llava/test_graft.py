"""LLaVA: the projector alone, on a base that is frozen or trained."""

from __future__ import annotations

import torch

from grafting import CONFIGS, batch, distance, graft_on, logits_of, plain, rows, text_labels
from mmgraft import LlavaConfig


def test_it_adds_nothing_but_the_projector() -> None:
    model = graft_on("llama", CONFIGS["llava"])
    linear = [f"mm.projector.mlp.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")]
    assert sorted(model.workflows.state_dict()) == sorted(linear)
    graft = model.workflow().graft
    assert list(graft.parameters()) == []
    assert (graft.slot_layers(), graft.groups(), graft.state()) == ([], {}, {"active": True})


def test_a_trained_base_changes_text_and_a_frozen_one_does_not() -> None:
    texts, inputs = batch(rows("tttttttt")), batch(rows("ttiiiitttt"))
    for groups, same in [(["projector"], True), (["projector", "base"], False)]:
        model = graft_on("llama", LlavaConfig(base="full"))
        model.set_trainable(groups)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        before = model(**inputs, labels=text_labels(inputs)).loss
        before.backward()
        optimizer.step()
        assert model(**inputs, labels=text_labels(inputs)).loss < before
        moved = distance(logits_of(model, texts), logits_of(plain("llama"), texts))
        assert (moved == 0.0) == same
