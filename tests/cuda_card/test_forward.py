"""Forward, generation and two cards: what a CPU computes, and no tensor of the wrong device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from grafting import CONFIGS, batch, graft_on, perturb, rows, text_labels, text_of, together
from mmgraft import GraftedModel
from mmgraft.grafts.base import IMAGE, Pass
from mmgraft.model.cache import RowSlot, extend
from pretend_cuda import CARD, Card, pretend_cuda
from tiny_runs import make_parts, make_run

MIXED = ("ttiiiitt", "ttttt", "tiiiiiiiit")  # an image, none, two
FORWARD = [("llama", method) for method in CONFIGS] + [("gemma3", "wings"), ("gpt2", "iaa-c")]
DECODING = [("llama", one) for one in ("iaa-c", "llava", "wings", "lora", "xattn")] + [
    ("gemma3", "wings")
]
MODES = {"greedy": {}, "beams": {"num_beams": 2}, "static": {"cache_implementation": "static"}}


def there(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(CARD) for name, tensor in inputs.items()}


def both(arch: str, method: str) -> tuple[GraftedModel, GraftedModel]:
    """A graft on the CPU, and the same one on the card."""
    plain, moved = (perturb(graft_on(arch, CONFIGS[method])) for _ in range(2))
    return plain, moved.to(CARD)


@torch.no_grad()
def compare(plain: GraftedModel, moved: GraftedModel, inputs: dict[str, Tensor], **more) -> None:
    real = inputs["attention_mask"].bool()
    wanted = plain(**inputs, use_cache=False, **more).logits[real]
    found = moved(**there(inputs), use_cache=False, **more).logits.cpu()[real]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("arch", "method"), FORWARD)
def test_forward(card: Card, arch: str, method: str) -> None:
    plain, moved = both(arch, method)
    for chosen, side in ((MIXED[:1], "right"), (MIXED, "left"), (MIXED, "right")):
        compare(plain, moved, batch(rows(*chosen), side))
    compare(plain, moved, text_of(batch(rows(*MIXED[1:2]))))
    compare(plain, moved, batch(rows(*MIXED[1:])), workflow="mm")


def test_rows_of_two_workflows(card: Card) -> None:
    plain, moved = (
        together(
            perturb(graft_on("llama", CONFIGS["wings"], workflow="one")),
            perturb(graft_on("llama", CONFIGS["iaa-c"], workflow="two")),
        )
        for _ in range(2)
    )
    moved.to(CARD)
    compare(plain, moved, batch(rows(*MIXED), "left"), workflow=["one", "text", "two"])


@pytest.mark.parametrize(("arch", "method"), DECODING)
def test_generation(card: Card, arch: str, method: str) -> None:
    plain, moved = both(arch, method)
    inputs = batch(rows(*MIXED), "left")
    length = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    for mode in MODES.values():
        made = moved.generate(**there(inputs), **length, **mode)
        assert torch.equal(made.cpu(), plain.generate(**inputs, **length, **mode))


def test_an_offloaded_cache(card: Card) -> None:
    """Its row slot, a few numbers, stays on the card."""
    plain, moved = both("llama", "wings")
    inputs = batch(rows(*MIXED), "left")
    length = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    made = moved.generate(**there(inputs), **length, cache_implementation="offloaded")
    assert torch.equal(made.cpu(), plain.generate(**inputs, **length))
    cache = DynamicCache()
    extend(cache, 0, [])
    ones = torch.ones(2, 3, dtype=torch.long, device=CARD)
    RowSlot(cache, 0).write(ones, ones, [0, 0], image=False)
    cache.layers[0].offload()
    assert cache.layers[0].keys.is_cuda


def test_masks_of_a_kind_have_a_width_that_kernels_take(card: Card) -> None:
    kinds = torch.tensor([[1] * 20, [1] * 9 + [2] * 11])
    for device, width in (("cpu", 11), (CARD, 16)):
        positions = torch.arange(20).expand(2, -1).to(device)
        there = kinds.to(device)
        state = Pass(
            cast(Any, None), torch.randn(2, 20, 4).to(device), there, positions, there, positions, 0
        )
        state.pack(IMAGE)
        assert state.packed[IMAGE].mask.shape == (2, 1, 20, width)
        assert state.packed[IMAGE].mask[1, 0, -1].sum() == 11


@pytest.mark.parametrize("method", ["iaa", "llava", "wings", "lora", "xattn"])
def test_two_cards(tmp_path: Path, method: str) -> None:
    run = make_run(make_parts(tmp_path), tmp_path / "run", method)
    layers = {f"model.layers.{index}": f"cuda:{index // 2}" for index in range(4)}
    first, last = ("model.embed_tokens", "model.rotary_emb"), ("model.norm", "lm_head")
    placed = {**dict.fromkeys(first, "cuda:0"), **layers, **dict.fromkeys(last, "cuda:1")}
    inputs = batch(rows(*MIXED), "left")
    inputs["image_features"] = inputs["image_features"][..., :16]  # the tower's width
    length = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    plain = perturb(GraftedModel.from_pretrained(run))
    labels = text_labels(inputs)
    with pretend_cuda(2):
        model = perturb(GraftedModel.from_pretrained(run, device_map=placed))
        assert {str(p.device) for p in model.parameters()} == {"cuda:0", "cuda:1"}
        found = model.generate(**there(inputs), **length).cpu()
        model.set_trainable(["projector"])
        loss = model.train()(**there(inputs), labels=labels.to(CARD)).loss
        loss.backward()
        found_loss = loss.item()
    assert torch.equal(found, plain.generate(**inputs, **length))
    wanted = plain.train()(**inputs, labels=labels).loss.item()
    assert found_loss == pytest.approx(wanted, rel=1e-4)
