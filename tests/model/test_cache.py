"""Extra slots in transformers' caches: their types, what refuses them, and going on from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from grafting import (
    CONFIGS,
    batch,
    distance,
    graft_on,
    grafted,
    logits_of,
    perturb,
    plain,
    row,
    rows,
    text_of,
)
from mmgraft import GraftedModel, WingsConfig
from mmgraft.errors import UsageError
from mmgraft.grafts.base import FULL_ATTENTION
from mmgraft.model.cache import PreallocatedLayer, RowLayer, RowSlot, extend
from tiny import LAYERS, WINDOW, tiny_config

both = pytest.mark.parametrize("method", ["iaa-c", "wings", "lora-token", "xattn"])


@torch.no_grad()
def run(model: GraftedModel, inputs: dict[str, Tensor], cache: Any = None, **options: Any) -> Any:
    return model(**inputs, past_key_values=cache, use_cache=True, **options)


def part(inputs: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    """Columns of a batch without images in them, for a cache of `start` columns."""
    return {
        "input_ids": inputs["input_ids"][:, start:end],
        "attention_mask": inputs["attention_mask"][:, :end],
    }


def prompt(inputs: dict[str, Tensor], end: int) -> dict[str, Tensor]:
    """The first columns, with all images of the batch in them."""
    cut = {k: v[:, :end] for k, v in inputs.items() if k != "image_features"}
    return {**cut, "image_features": inputs["image_features"]}


def test_slots_take_the_type_of_their_layer() -> None:
    config = tiny_config("gemma2")  # sliding, full, sliding, full
    slots = [FULL_ATTENTION, 0, 1]
    dynamic = DynamicCache(config=config)
    extend(dynamic, LAYERS, slots)
    kinds = [type(layer) for layer in dynamic.layers[LAYERS:]]
    assert kinds == [RowLayer, PreallocatedLayer, DynamicSlidingWindowLayer, DynamicLayer]
    assert dynamic.layers[LAYERS + 2].sliding_window == WINDOW
    static = StaticCache(config=config, max_cache_len=20)
    extend(static, LAYERS, [0, 1])
    kinds = [type(layer) for layer in static.layers[LAYERS:]]
    assert kinds == [RowLayer, StaticSlidingWindowLayer, StaticLayer]
    assert static.layers[LAYERS + 1].max_cache_len == WINDOW
    assert static.layers[LAYERS + 2].max_cache_len == 20
    for cache, slots_ in ((dynamic, slots), (static, [0, 1])):
        before = list(cache.layers)
        extend(cache, LAYERS, slots_)  # once is enough
        assert cache.layers == before
    growing = DynamicCache()
    extend(growing, LAYERS, slots)
    assert [type(layer) for layer in growing.layers] == [*[DynamicLayer] * LAYERS, RowLayer]


def test_a_slot_records_the_past_where_its_layer_does() -> None:
    """Assisted decoding takes rejected drafts back from sliding layers."""
    cache = DynamicCache(config=tiny_config("gemma2"))
    cache.layers[0].activate_past_recording()
    extend(cache, LAYERS, [0, 2])
    assert [layer.record_past for layer in cache.layers[LAYERS + 1 :]] == [True, False]


def test_caches_that_cannot_hold_a_graft_are_refused() -> None:
    # Its backends need other packages or another transformers; what it holds is not looked at.
    quantized = QuantizedCache.__new__(QuantizedCache)
    with pytest.raises(UsageError, match="quantized"):
        extend(quantized, LAYERS, [0])

    class Strange(DynamicLayer):
        pass

    with pytest.raises(UsageError, match="Strange"):
        extend(Cache(layer_class_to_replicate=Strange), LAYERS, [0])
    with pytest.raises(UsageError, match="Strange"):
        extend(Cache(layers=[Strange() for _ in range(LAYERS)]), LAYERS, [0])


def test_a_cache_from_before_a_workflow_was_added_is_refused() -> None:
    model = perturb(graft_on("llama", CONFIGS["iaa-c"]))
    inputs = batch([row("ttiiiittt")])
    cache = run(model, prompt(inputs, 8)).past_key_values
    model._attach(graft_on("llama", CONFIGS["iaa-a"], workflow="grounding").workflow())
    with pytest.raises(UsageError, match="begin with a fresh cache"):
        run(model, part(inputs, 8, 9), cache)


def test_the_row_slot_remembers_kinds_positions_and_workflows() -> None:
    cache = DynamicCache()
    extend(cache, 0, [])
    slot = RowSlot(cache, 0)
    assert not slot.filled
    kinds, positions = torch.tensor([[1, 2], [0, 1]]), torch.tensor([[0, 1], [0, 0]])
    slot.write(kinds, positions, [0, -1], image=True)
    *found, any_image = slot.write(kinds[:, :1], positions[:, 1:] + 1, [0, -1], image=False)
    assert [t.tolist() for t in found] == [[[1, 2, 1], [0, 1, 0]], [[0, 1, 2], [0, 0, 1]]]
    assert any_image
    assert slot.filled
    assert slot.workflows() == [0, -1]
    cache.reorder_cache(torch.tensor([1, 1]))
    assert slot.workflows() == [-1, -1]
    assert not RowSlot(None, 4).filled


@both
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_cropped_cache_goes_on_with_other_tokens(arch: str, method: str) -> None:
    model = grafted(arch, method)
    inputs = batch(rows("ttiiiittttttt", "tiiiitttt"), "left")
    other = dict(inputs, input_ids=inputs["input_ids"].clone())
    other["input_ids"][:, 10:] += 1
    cache = DynamicCache(config=model.base.config)
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.activate_past_recording()
    run(model, prompt(inputs, 9), cache)
    run(model, part(inputs, 9, 13), cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 10
    found = run(model, part(other, 10, 13), cache).logits
    assert distance(found, logits_of(model, other)[:, 10:]) < 1e-5


@both
def test_rows_of_a_cache_are_reordered_repeated_and_chosen(method: str) -> None:
    """A row that runs text and one that runs the graft change places."""
    model = grafted("llama", method)
    inputs = batch(rows("ttiiiittttt", "tttttttt"), "left")
    for order in ([1, 0], [0, 0], [1, 1]):
        cache = run(model, prompt(inputs, 9)).past_key_values
        cache.reorder_cache(torch.tensor(order))
        turned = {k: v[order] for k, v in part(inputs, 9, 11).items()}
        expected = logits_of(model, inputs)[order][:, 9:]
        if order == [1, 1]:
            expected = logits_of(plain("llama"), text_of(inputs))[order][:, 9:]
        assert distance(run(model, turned, cache).logits, expected) < 1e-5
    cache = run(model, prompt(inputs, 9)).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    turned = {k: v[[1, 0]] for k, v in part(inputs, 9, 11).items()}
    expected = logits_of(model, inputs)[[1, 0]][:, 9:]
    assert distance(run(model, turned, cache).logits, expected) < 1e-5


@both
def test_what_the_caller_asks_for_must_fit_the_cache(method: str) -> None:
    model = grafted("llama", method)
    inputs = batch([row("ttiiiittttt")])
    cache = run(model, prompt(inputs, 9)).past_key_values
    step = part(inputs, 9, 11)
    with pytest.raises(UsageError, match="another workflow"):
        run(model, step, cache, workflow="text")
    expected = logits_of(model, inputs)[:, 9:]
    assert distance(run(model, step, cache, workflow="mm").logits, expected) < 1e-5


@pytest.mark.parametrize("method", ["iaa-c", "wings", "lora"])  # others: test_text_cache.py
def test_a_picture_after_cached_text_is_refused(method: str) -> None:
    model = grafted("llama", method)
    words = batch([row("tttttt")])
    with torch.no_grad():
        cache = model(**words, use_cache=True).past_key_values
    whole = batch([row("ttttttiiiitt")])
    picture = {
        "input_ids": whole["input_ids"][:, 6:],
        "mm_token_type_ids": whole["mm_token_type_ids"][:, 6:],
        "image_features": whole["image_features"],
        "attention_mask": whole["attention_mask"],
    }
    for call in (lambda: run(model, picture, cache), lambda: model.generate(
        **whole, past_key_values=cache, max_new_tokens=2, do_sample=False
    )):  # fmt: skip
        with pytest.raises(UsageError, match="run the whole dialogue again"):
            call()
    # The cache is still good for text.
    more = batch([row("tttttt")])["input_ids"].repeat(1, 2)
    found = run(model, {"input_ids": more[:, 6:]}, cache).logits
    expected = logits_of(plain("llama"), {"input_ids": more})[:, 6:]
    assert distance(found, expected) < 1e-5


def test_a_refused_step_leaves_the_cache_as_it_was() -> None:
    model = perturb(graft_on("llama", WingsConfig(rank=2, max_length=10)))
    inputs = batch([row("ttiiiittttt")])
    cache = run(model, prompt(inputs, 8)).past_key_values
    with pytest.raises(UsageError, match="11 positions"):
        run(model, part(inputs, 8, 11), cache)
    shorter = {k: v[:, :10] for k, v in inputs.items() if k != "image_features"}
    expected = logits_of(model, {**shorter, "image_features": inputs["image_features"]})
    found = run(model, part(inputs, 8, 10), cache).logits
    assert distance(found, expected[:, 8:]) < 1e-5


@both
def test_a_cache_without_types_holds_sliding_layers_too(method: str) -> None:
    """`DynamicCache()` without a config keeps all positions; the mask alone makes the window."""
    model = grafted("gemma2", method)
    inputs = batch(rows("ttiiiitttttttt", "tiiiittttt"), "left")
    cache = DynamicCache()
    first = run(model, prompt(inputs, 10), cache)
    second = run(model, part(inputs, 10, 14), cache)
    real = inputs["attention_mask"].bool()
    found = torch.cat([first.logits, second.logits], dim=1)
    assert distance(found[real], logits_of(model, inputs)[real]) < 1e-5
