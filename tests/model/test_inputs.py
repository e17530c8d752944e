"""Check what a model refuses among its inputs, and text rows that train the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grafting import (
    CONFIGS,
    batch,
    cross_entropy,
    every_method,
    fresh,
    graft_on,
    logits_of,
    perturb,
    rows,
    text_labels,
    trained_groups,
)
from mmgraft.errors import UsageError
from mmgraft.model import forward as running


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_images_without_a_position_are_not_left_out_unsaid(call: str) -> None:
    model = fresh("llama", "llava")
    inputs = batch(rows("ttiiiitt"))
    del inputs["mm_token_type_ids"]
    with pytest.raises(UsageError, match="mm_token_type_ids"):
        getattr(model, call)(**inputs)


def test_image_positions_that_are_no_whole_images() -> None:
    model = fresh("llama", "llava")
    inputs = batch(rows("ttiiiitt", "ttiiiitt"))
    inputs["mm_token_type_ids"][0, 2], inputs["mm_token_type_ids"][1, 6] = 0, 1
    with pytest.raises(UsageError, match="row 0 has 3 image positions"):
        model(**inputs)


@pytest.mark.parametrize("method", ["iaa-c", "llava"])
def test_labels_for_logits_that_are_more_than_the_heads(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is that of the base's own logits; here they get a bias after the head."""
    model = perturb(graft_on("llama", CONFIGS[method]))
    plain_forward, bias = model.base.forward, torch.linspace(-3, 3, model.anatomy.vocab_size)

    def biased(**given: Any) -> Any:
        out = plain_forward(**given)
        out.logits = out.logits + bias
        return out

    monkeypatch.setattr(model.base, "forward", biased)
    model.anatomy = replace(model.anatomy, logits_blocked="TinyForCausalLM adds a bias of its own")
    inputs = batch(rows("ttiiiitt", "tttttt"))
    labels = text_labels(inputs)
    expected = cross_entropy(logits_of(model, inputs), labels)
    assert torch.allclose(model(**inputs, labels=labels).loss, expected, rtol=1e-5)
    model.anatomy = replace(model.anatomy, logits_blocked=None)
    assert not torch.allclose(model(**inputs, labels=labels).loss, expected, rtol=1e-2)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi"])
def test_text_rows_that_train_the_base_are_checkpointed_too(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = graft_on(arch, CONFIGS["llava"]).train()
    model.set_trainable(["projector", "base"])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = batch(rows("ttttttt", "ttttt"))
    labels = text_labels(inputs)
    model(**inputs, labels=labels).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.base.named_parameters()}
    model.zero_grad()
    calls: list[int] = []
    again = running.checkpoint
    monkeypatch.setattr(running, "checkpoint", lambda *a, **k: calls.append(1) or again(*a, **k))
    model.gradient_checkpointing_enable()
    model(**inputs, labels=labels).loss.backward()
    assert len(calls) == model.anatomy.num_layers
    for name, parameter in model.base.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


def test_an_option_that_a_second_workflow_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="revison"):
        graft_on("llama", CONFIGS["llava"]).add_workflow("more", tmp_path, revison="main")


@every_method
def test_a_graft_in_training_can_be_asked(method: str) -> None:
    """Its parameters are fp32 then, and the base's bf16; a training step runs under autocast."""
    model = perturb(graft_on("llama", CONFIGS[method], dtype=torch.bfloat16))
    model.set_trainable(trained_groups(method))
    inputs = batch(rows("ttiiiitt", "ttttt"), "left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = logits_of(model, inputs)
    difference = (logits_of(model, inputs).float() - wanted.float()).abs()
    assert difference.mean() < 0.02 * wanted.float().abs().mean()  # what bf16 rounds
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
