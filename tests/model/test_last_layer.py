"""The last layer feeds forward what is read, and losses and gradients are as without it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grafting import CONFIGS, batch, graft_on, perturb, rows, text_labels, trained_groups
from inside_grafts import PositionGatedExpert, RowGatedLora
from mmgraft import GraftedModel, IAAConfig
from mmgraft.grafts import Graft
from mmgraft.model import modeling
from mmgraft.model.loss import fed_at, last_layer

WORDS = ("ttiiiitttttt", "iiiitttttt")
LEARNED = 7 + 5  # text after the first position, less what is predicted from an image's last one


def model_of(arch: str, config: Any) -> GraftedModel:
    model = perturb(graft_on(arch, config))
    model.set_trainable(trained_groups(model.workflow().graft.method))
    return model.train()


def step(model: GraftedModel, words: tuple[str, ...] = WORDS) -> dict[str, Tensor]:
    inputs = batch(rows(*words))
    model.zero_grad()
    torch.manual_seed(0)  # dropout
    loss = model(**inputs, labels=text_labels(inputs)).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def fed(module: nn.Module) -> list[int]:
    """Positions that a feed-forward is given, call by call."""
    seen: list[int] = []
    parts = [part for part in module.modules() if isinstance(part, nn.Linear)]
    parts[0].register_forward_hook(lambda _, given, __: seen.append(given[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt_neox", "falcon", "cohere", "qwen3_moe"])
@pytest.mark.parametrize("method", ["llava", "iaa-b", "iaa-c", "wings", "lora", "expert", "xattn"])
def test_losses_and_gradients_are_the_same(
    arch: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(arch, CONFIGS[method])
    found = step(model)
    monkeypatch.setattr(modeling, "fed_at", lambda layer, wanted: nullcontext())
    wanted = step(model)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("method", ["lora", "lora-token", "expert"])
def test_linear_layers_in_the_last_feed_forward_see_whole_rows_of_a_mixed_batch(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, words = model_of("llama", CONFIGS[method]), ("tttttttttt", "ttiiiitttttt")
    found = step(model, words)  # a row of text first: it would be taken for the one with the image
    monkeypatch.setattr(modeling, "fed_at", lambda layer, wanted: nullcontext())
    wanted = step(model, words)
    last = [name for name in wanted if ".feedforward.3." in name]
    assert last
    assert all(wanted[name].abs().max() > 0 for name in last)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("structure", ["a", "b", "c"])
def test_the_inserted_layer_at_the_end_is_the_last_one(structure: Any) -> None:
    model = model_of("llama", IAAConfig(layers=[1, 3], structure=structure))
    base, graft = model.base.model.layers, model.workflow().graft  # type: ignore[union-attr]
    calls = [fed(part.mlp) for part in (base[3], graft.layers[0], graft.layers[1])]  # type: ignore[index,union-attr]
    step(model)
    length = 2 * len(WORDS[0])
    assert calls == [[length], [length], [int(learned(model).sum())]]


@pytest.mark.parametrize("kind", [RowGatedLora, PositionGatedExpert])
def test_a_graft_inside_the_last_feed_forward_sees_whole_rows(
    kind: type[Graft], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = graft_on("llama", CONFIGS["llava"])
    inside = kind(CONFIGS["llava"], model.anatomy)
    model.workflow().graft = inside
    perturb(model, size=0.3)
    model.set_trainable(["projector", "graft"])
    model.train()
    words = ("tttttttttt", "ttiiiitttttt")  # a row of text first
    found = step(model, words)
    monkeypatch.setattr(modeling, "fed_at", lambda layer, wanted: nullcontext())
    wanted = step(model, words)
    assert found.keys() == wanted.keys()
    assert any(".parts.3." in name and wanted[name].abs().max() > 0 for name in wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-4, msg=name)
    assert last_layer(list(model.base.model.layers), [(inside, None)]) is None  # type: ignore[union-attr]


def learned(model: GraftedModel) -> Tensor:
    from mmgraft.model.rows import Rows

    return model._supervised(text_labels(batch(rows(*WORDS))), Rows(["mm"] * len(WORDS)))


def test_without_one_it_is_the_bases_for_rows_of_any_workflow() -> None:
    model = model_of("llama", CONFIGS["llava"])
    seen = fed(model.base.model.layers[3].mlp)  # type: ignore[union-attr,index]
    step(model)
    step(model, ("ttiiiitttttt", "tttttttttt"))
    assert seen[0] == int(learned(model).sum())
    assert 0 < seen[1] < seen[0]  # the row of text trains nothing
    model.gradient_checkpointing_enable()
    step(model)
    assert seen[2:] == [2 * len(WORDS[0])] * 2  # and once more in the backward pass


def test_rows_that_end_in_different_layers_share_none() -> None:
    model = model_of("llama", IAAConfig(layers=[3]))
    graft, layers = model.workflow().graft, list(model.base.model.layers)  # type: ignore[union-attr]
    assert last_layer(layers, [(graft, None)]) is graft.layers[0]  # type: ignore[index]
    assert last_layer(layers, [(graft, torch.tensor([True, False]))]) is None
    assert last_layer(layers, [(graft, None), (graft, None)]) is None
    graft.active = False
    assert last_layer(layers, [(graft, None)]) is layers[-1]


def test_what_a_strange_method_runs_at_the_end_is_not_guessed() -> None:
    class Mixing(type(graft_on("llama", CONFIGS["llava"]).workflow().graft)):  # type: ignore[misc]
        def acts_on(self, index: int) -> bool:
            return True

        def after_layer(self, index: Any, call: Any, entered: Any, left: Any, *_: Any) -> Any:
            return left.flip(1), None

    model = graft_on("llama", CONFIGS["llava"])
    model.workflow().graft.__class__ = Mixing
    graft, layers = model.workflow().graft, list(model.base.model.layers)  # type: ignore[union-attr]
    assert last_layer(layers, [(graft, None)]) is None


@pytest.mark.parametrize("kind", ["experts", "dropout", "unknown"])
def test_a_feed_forward_of_another_kind_stays_as_it_is(kind: str) -> None:
    class TinyMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)
            if kind == "experts":
                self.experts = nn.ModuleList([nn.Linear(4, 4)])
            elif kind == "dropout":
                self.drop = nn.Dropout(0.1)
            else:
                self.mix = nn.Conv1d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x)

    layer = nn.Module()
    layer.mlp = TinyMLP()
    seen = fed(layer)
    with fed_at(layer, torch.eye(2, 5).bool()):
        layer.mlp(torch.ones(2, 5, 4))
    assert seen == [10]
