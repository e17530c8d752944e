"""Make activations again for the backward pass: same bits, less kept."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grafting import CONFIGS, batch, graft_on, perturb, rows, text_labels, trained_groups
from mmgraft import GraftedModel
from mmgraft.model import forward as running
from mmgraft.model.kernels import activations
from mmgraft.model.kernels.activations import activations_again

WORDS = ("ttiiiitttttt", "iiiitttttt")


class Counted:
    """Counter of tensors that were made again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        make = activations._Again.make

        def counted(again: Any) -> Tensor:
            self.count += 1
            return make(again)

        monkeypatch.setattr(activations._Again, "make", counted)


def step(model: GraftedModel) -> dict[str, Tensor]:
    inputs = batch(rows(*WORDS))
    model.zero_grad()
    torch.manual_seed(0)  # dropout
    loss = model(**inputs, labels=text_labels(inputs)).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


@pytest.mark.parametrize(
    ("arch", "method", "again"),
    [
        ("llama", "llava", 4),
        ("llama", "iaa-c", 6),
        ("llama", "wings", 4),
        ("gemma3", "llava", 4),  # GELU by tanh
        ("gpt_neox", "iaa-c", 2),  # plain: only a trained layer keeps the activation at all
        ("qwen3_moe", "llava", None),  # as many as experts were asked
        ("gpt2", "iaa-c", 0),  # a GELU of many operations
    ],
)
def test_gradients_are_the_same_to_the_bit(
    arch: str, method: str, again: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = perturb(graft_on(arch, CONFIGS[method]))
    model.set_trainable(trained_groups(model.workflow().graft.method))
    model.train()
    counted = Counted(monkeypatch)
    found = step(model)
    assert counted.count > 0 if again is None else counted.count == again
    monkeypatch.setattr(running, "activations_again", lambda modules: nullcontext())
    wanted = step(model)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def test_not_where_layers_are_checkpointed_or_nothing_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = graft_on("llama", CONFIGS["llava"])
    model.set_trainable(["projector"])
    model.train()
    counted = Counted(monkeypatch)
    model.gradient_checkpointing_enable()
    step(model)
    assert counted.count == 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_whoever_else_handles_what_is_kept_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graft_on("llama", CONFIGS["llava"])
    model.set_trainable(["projector"])
    model.train()
    counted, seen = Counted(monkeypatch), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        step(model)
    assert counted.count == 0
    assert len(seen) > 50


def test_another_tensor_in_the_same_place_is_kept_as_it_is() -> None:
    """The place of a result that is gone may be given to the next tensor of its size."""
    made, x = activations._Made(), torch.randn(4, 6, requires_grad=True)
    out = made.run(torch.nn.functional.silu, x)
    entry = made._known[activations._storage(out)]
    assert isinstance(made.pack(out.detach()), activations._Again)
    del out
    other = torch.randn(4, 6)
    made._known[activations._storage(other)] = entry
    assert made.pack(other) is other


def test_a_part_or_a_changed_result_is_kept_as_it_is() -> None:
    act, x = nn.SiLU(), torch.randn(4, 6, requires_grad=True)
    with activations_again([act]):
        out = act(x)
        part = (out[:, :3] * out[:, 3:]).sum()
        turned = (out.T * torch.ones(6, 4, requires_grad=True)).sum()
        doubled = act(x).mul_(2)
        changed = (doubled * doubled).sum()
    s = torch.nn.functional.silu(x)
    wanted = (s[:, :3] * s[:, 3:]).sum() + s.sum() + (2 * s).square().sum()
    (grad,) = torch.autograd.grad(part + turned + changed, x)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, x)[0])


def test_an_activation_in_place_is_left_alone() -> None:
    x = torch.randn(5, requires_grad=True)
    act = nn.SiLU(inplace=True)
    with activations_again([act]):
        out = act(x * 1.0)
        y = (out * torch.ones(5, requires_grad=True)).sum()
    (grad,) = torch.autograd.grad(y, x)
    wanted = torch.autograd.grad(torch.nn.functional.silu(x).sum(), x)[0]
    torch.testing.assert_close(grad, wanted)
