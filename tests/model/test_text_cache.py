"""A cache that text filled goes on when an image arrives, where text before it is the base's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from grafting import (
    CONFIGS,
    MIXTURES,
    batch,
    distance,
    every_architecture,
    graft_on,
    grafted,
    image_count,
    logits_of,
    perturb,
    plain,
    rows,
    together,
)
from mmgraft.errors import UsageError

WORD, TEXT = "ttttttttttiiiittttiiiitt", 10
PIECES = [(0, 7), (7, 8), (8, 9), (9, 10), (10, 17), (17, 18), (18, 24)]
GO_ON = ["llava", "lora-token", "expert", "xattn"]
BEGIN_ANEW = ["iaa-a", "iaa-b", "iaa-c", "wings", "lora"]


@torch.no_grad()
def in_pieces(
    model: Any, inputs: dict[str, Tensor], first: str | None = None, cache: Any = None
) -> tuple[Tensor, Any]:
    """Logits of a row read piece by piece; the text before the image by the workflow `first`."""
    cache = DynamicCache(config=model.base.config) if cache is None else cache
    kinds, found, shown = inputs["mm_token_type_ids"], [], 0
    for start, end in PIECES:
        given = {
            "input_ids": inputs["input_ids"][:, start:end],
            "attention_mask": inputs["attention_mask"][:, :end],
            "past_key_values": cache,
        }
        images = image_count(kinds[:, start:end])
        if images:
            given["mm_token_type_ids"] = kinds[:, start:end]
            given["image_features"] = inputs["image_features"][shown : shown + images]
            shown += images
        elif end <= TEXT and first is not None:
            given["workflow"] = first
        found.append(model(**given).logits)
    return torch.cat(found, dim=1), cache


def tensors(cache: Any, layers: int) -> list[Tensor]:
    return [one for layer in cache.layers[:layers] for one in (layer.keys, layer.values)]


@every_architecture
@pytest.mark.parametrize("method", GO_ON)
def test_it_is_what_a_fresh_cache_gives_and_near_what_reading_at_once_does(
    arch: str, method: str
) -> None:
    model, inputs = grafted(arch, method), batch(rows(WORD))
    ours, cache = in_pieces(model, inputs)
    expected, fresh = in_pieces(model, inputs, first="mm")
    assert torch.equal(ours, expected)
    pairs = zip(tensors(cache, 4), tensors(fresh, 4), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    once = logits_of(model, inputs)
    # A token that rounding sends to another expert moves more.
    assert distance(ours, once) < 1e-5 * (10 if arch in MIXTURES else 1)
    assert torch.equal(ours.argmax(-1), once.argmax(-1))


@pytest.mark.parametrize("method", GO_ON)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generate_goes_on_for_padded_rows(method: str, kind: str) -> None:
    """Text of two lengths, answered by the base; then an image arrives in both rows."""
    model, words = grafted("llama", method), ("ttttttt", "ttttttttttt")
    texts = batch(rows(*words), "left")
    config = model.base.config
    cache: Any = (
        DynamicCache(config=config)
        if kind == "dynamic"
        else StaticCache(config=config, max_cache_len=40)
    )
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 2}
    said = model.generate(**texts, past_key_values=cache, **options)
    assert torch.equal(said, plain("llama").generate(**texts, **options))
    more = batch(rows("iiiitt", "tiiiit"))
    whole = {
        "input_ids": torch.cat([said, more["input_ids"]], dim=1),
        "attention_mask": torch.cat(
            [texts["attention_mask"], torch.ones(2, 3).long(), more["attention_mask"]], dim=1
        ),
        "image_features": more["image_features"],
    }
    kinds = torch.zeros_like(said)
    whole["mm_token_type_ids"] = torch.cat([kinds, more["mm_token_type_ids"]], dim=1)
    found = model.generate(**whole, past_key_values=cache, **options)
    assert torch.equal(found, model.generate(**whole, **options))


@pytest.mark.parametrize("method", BEGIN_ANEW)
def test_other_methods_refuse_and_say_why(method: str) -> None:
    model = grafted("llama", method)
    with pytest.raises(UsageError, match="an image changes how the earlier text is read"):
        in_pieces(model, batch(rows(WORD)))


def test_out_of_the_path_nothing_reads_text_anew() -> None:
    model = perturb(graft_on("llama", CONFIGS["lora"]))
    model.workflow().graft.set_state({"active": False})
    ours, _ = in_pieces(model, batch(rows(WORD)))
    assert torch.equal(ours, in_pieces(model, batch(rows(WORD)), first="mm")[0])


@torch.no_grad()
def test_a_row_of_text_in_a_batch_with_images_goes_on_too() -> None:
    """Each row by itself: one began with an image, one of text gets one, one stays text."""
    made = [
        perturb(graft_on("llama", CONFIGS["lora-token"])),
        perturb(graft_on("llama", CONFIGS["wings"], workflow="winged"), seed=3),
    ]
    model = together(*made)
    first, second = rows("tiiiittt", "tttttttt", "tttttttt"), rows("tttttt", "iiiitt", "tttttt")
    given, more = batch(first), batch(second)
    cache = DynamicCache(config=model.base.config)
    model(**given, past_key_values=cache)
    mask = torch.cat([given["attention_mask"], more["attention_mask"]], dim=1)
    step = {**more, "attention_mask": mask, "past_key_values": cache}
    with pytest.raises(UsageError, match="a row now needs 'winged'"):
        model(**step, workflow=["mm", "winged", "text"])
    with pytest.raises(UsageError, match="another workflow than the one wanted"):
        model(**step, workflow=["text", "mm", "text"])
    found = model(**step).logits
    for number, names in enumerate(("mm", "mm", "text")):
        ids = torch.cat([first[number].ids, second[number].ids])[None]
        kinds = torch.cat([first[number].kinds, second[number].kinds])[None]
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kinds.any():
            features = torch.cat([first[number].features, second[number].features])
            whole |= {"mm_token_type_ids": kinds, "image_features": features}
        wanted = logits_of(model, whole, workflow=names)[0, 8:]
        assert distance(found[number], wanted) < 1e-5, number
    model(input_ids=torch.full((3, 1), 9), past_key_values=cache)  # each as it runs now
    slot = cache.layers[model.anatomy.num_layers].keys[:, 0, :, 0]
    assert slot[:, 0].tolist() == [0, -1, -1]
    assert slot[:, -1].tolist() == [0, 0, -1]


def test_cut_back_to_its_text_a_cache_runs_text_again() -> None:
    model, inputs = grafted("llama", "llava"), batch(rows(WORD))
    _, cache = in_pieces(model, inputs)
    cache.crop(TEXT - len(WORD))
    for layer in cache.layers:
        assert layer.keys.shape[2] == TEXT
    step = {"input_ids": torch.tensor([[7, 8]]), "past_key_values": cache}
    with torch.no_grad():
        found = model(**step, workflow="text").logits
        fresh = DynamicCache(config=model.base.config)
        plain("llama")(input_ids=inputs["input_ids"][:, :TEXT], past_key_values=fresh)
        expected = plain("llama")(input_ids=step["input_ids"], past_key_values=fresh).logits
    assert distance(found, expected) < 1e-5
