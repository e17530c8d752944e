"""Layers through torch.compile give the same losses and gradients; what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from grafting import CONFIGS, batch, graft_on, grafted, perturb, rows, text_labels
from mmgraft import GraftedModel
from mmgraft.errors import UsageError
from mmgraft.model.kernels.compiling import compiled_layers

BATCHES = [("ttiiiitttt", "ttttiiiitt"), ("tttttttiiiittt", "tiiiittt")]


def step(model: GraftedModel, words: tuple[str, ...]) -> dict[str, Tensor]:
    inputs = batch(rows(*words))
    model.zero_grad()
    loss = model(**inputs, labels=text_labels(inputs), workflow="mm").loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def test_compiled_layers_compute_the_same() -> None:
    """Base layers and inserted ones, also where the backward pass computes them again."""
    torch._dynamo.reset()
    model = perturb(graft_on("llama", CONFIGS["iaa-c"]))
    model.set_trainable(["projector", "graft"])
    model.train()
    wanted = [step(model, words) for words in BATCHES]
    counter = CompileCounter()  # dynamo with no compiler behind it
    graft = model.workflow().graft
    with compiled_layers(model.base, model.anatomy, [graft], backend=counter):
        found = [step(model, words) for words in BATCHES]
        model.gradient_checkpointing = True
        found += [step(model, words) for words in BATCHES]
    assert 0 < counter.frame_count <= 4  # four layers and two inserted ones share what is compiled
    for one, other in zip(found, wanted * 2, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5, msg=name)
    layers: list[Any] = [*model.base.model.layers, *graft.layers]  # type: ignore[union-attr]
    assert not any("forward" in vars(layer) for layer in layers)


def test_learners_in_every_layer_leave_nothing_to_compile() -> None:
    model = grafted("llama", "wings")
    graft = model.workflow().graft
    with (
        pytest.raises(UsageError, match="finds no layer to compile"),
        compiled_layers(model.base, model.anatomy, [graft]),
    ):
        pass
