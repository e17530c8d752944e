"""Flash attention under the grafts and measurements, with a stand-in for its package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from grafting import CONFIGS, batch, graft_on, perturb, rows, text_labels
from mmgraft import GraftedModel
from mmgraft.errors import UsageError
from mmgraft.evaluation.attention.laws import layer_sums
from pretend_cuda import CARD, Card
from pretend_flash import Calls, pretend_flash

HEADS = {"llama": 8, "gemma3": 12}  # width of the tiny bases' heads
ROWS = {"even": rows("ttiiiitt", "tiiiittt"), "padded": rows("ttiiiitt", "ttttt")}


@pytest.fixture
def flash(card: Card) -> Iterator[Calls]:
    with pretend_flash() as calls:
        yield calls


def pair(arch: str, method: str) -> tuple[GraftedModel, GraftedModel]:
    """A graft in bf16 on the card, with explicit attention and with flash."""
    found = []
    for kernel in ("eager", "flash_attention_2"):
        model = graft_on(arch, CONFIGS[method], dtype=torch.bfloat16, attention=kernel)
        found.append(perturb(model).to(CARD))
    return found[0], found[1]


def there(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(CARD) for name, tensor in inputs.items()}


@torch.no_grad()
@pytest.mark.parametrize("arch", HEADS)
def test_wings_computes_what_it_does_with_explicit_weights(flash: Calls, arch: str) -> None:
    explicit, fast = pair(arch, "wings")
    for chosen in ROWS.values():
        inputs = batch(chosen, "left")
        real = inputs["attention_mask"].bool()
        inputs = there(inputs)
        wanted = explicit(**inputs, use_cache=True)
        found = fast(**inputs, use_cache=True)
        assert flash.widths
        close(found.logits.cpu()[real], wanted.logits.cpu()[real])
        more: dict[str, Any] = {"input_ids": inputs["input_ids"][:, :1]}
        longer = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        wanted = explicit(**more, attention_mask=longer, past_key_values=wanted.past_key_values)
        flash.widths.clear()
        found = fast(**more, attention_mask=longer, past_key_values=found.past_key_values)
        close(found.logits.cpu(), wanted.logits.cpu())
        assert set(flash.widths) == {HEADS[arch]}, "a decoded token copies no keys"


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).norm() <= 0.03 * wanted.norm()


def test_wings_trains(flash: Calls) -> None:
    losses = []
    for model in pair("llama", "wings"):
        model.set_trainable(["projector", "graft"])
        inputs = batch(ROWS["padded"])
        labels = text_labels(inputs).to(CARD)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model.train()(**there(inputs), labels=labels).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("method", ["iaa-c", "wings"])
def test_sums_of_attention_are_those_of_explicit_weights(flash: Calls, method: str) -> None:
    inputs = there(batch(rows("ttiiiitt", "tiiiit")))
    explicit, fast = (layer_sums(model, inputs) for model in pair("llama", method))
    assert flash.widths
    for series, wanted in explicit.items():
        assert fast[series].sums == pytest.approx(wanted.sums, rel=0.03, abs=0.03)


def test_a_router_that_needs_weights_is_refused_with_flash(flash: Calls) -> None:
    with pytest.raises(UsageError, match=r"gemma2.*attention: eager"):
        graft_on("gemma2", CONFIGS["wings"], attention="flash_attention_2")
    assert graft_on("gemma2", CONFIGS["iaa-c"], attention="flash_attention_2") is not None
