"""In step across ranks, every part runs for every batch and computes what it computed before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from grafting import (
    CONFIGS,
    batch,
    graft_on,
    perturb,
    rows,
    text_labels,
    trained_groups,
)
from mmgraft.model.sharded import gathered, is_piece, join, like


def test_join_adds_zeros_only_where_no_gradient_is():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((2,), torch.nan))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    x = torch.ones(3, requires_grad=True)
    joined = join(x * 2, [used, unused, frozen])
    (joined * used).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert torch.equal(used.grad, torch.full((3,), 2.0))
    assert torch.equal(unused.grad, torch.zeros(2))  # its value is not looked at
    assert frozen.grad is None


def test_join_reaches_what_is_no_parameter_whatever_becomes_of_it():
    hidden = torch.ones(2, requires_grad=True) * 3
    loss = join(torch.zeros(()), [hidden])
    seen: list[torch.Tensor] = []
    hidden.register_hook(seen.append)
    loss.backward()
    assert torch.equal(seen[0], torch.zeros(2))


def test_join_leaves_alone_what_asks_for_nothing():
    x = torch.ones(2)
    assert join(x, [nn.Parameter(torch.ones(1), requires_grad=False)]) is x
    with torch.no_grad():
        assert join(x, [nn.Parameter(torch.ones(1))]) is x


@pytest.mark.parametrize(
    "method", ["iaa-a", "iaa-c", "wings", "llava", "lora-token", "expert", "xattn"]
)
@pytest.mark.parametrize("words", [("tiiiitt", "tttt"), ("ttt", "ttttt")], ids=["mixed", "text"])
def test_every_trained_part_gets_a_gradient_and_the_loss_is_the_same(
    method: str, words: tuple[str, ...]
):
    """Text alone, a zero loss otherwise, runs all parts too, each for no row."""
    model = perturb(graft_on("llama", CONFIGS[method]))
    model.set_trainable(trained_groups(method))
    model.train()
    inputs = batch(rows(*words))
    given: dict[str, Any] = {**inputs, "labels": text_labels(inputs)}
    given["workflow"] = ["mm" if "i" in word else "text" for word in words]
    loss = model(**given).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.grad for name, p in trained.items()}
    model.zero_grad()
    model.in_step = True
    mine = model(**given).loss
    mine.backward()
    assert mine.item() == loss.item()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        wanted = torch.zeros_like(parameter) if before[name] is None else before[name]
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-6, rtol=1e-5)


def test_what_is_whole_is_gathered_as_it_is():
    tensor = torch.ones(2)
    assert not is_piece(tensor)
    assert gathered({"a": tensor, "b": tensor})["b"].data_ptr() == tensor.data_ptr()
    assert gathered({"a": tensor}, keep=False) == {}
    assert like(tensor, torch.zeros(2)) is tensor
