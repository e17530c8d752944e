"""`generate`: every decoding mode gives what full forwards without a cache give."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

from grafting import (
    CONFIGS,
    batch,
    every_architecture,
    every_method,
    every_pair,
    graft_on,
    grafted,
    image_count,
    logits_of,
    perturb,
    plain,
    row,
    rows,
    together,
)
from mmgraft import GraftedModel, WingsConfig
from mmgraft.errors import UsageError
from mmgraft.published.wings.config import OfficialWingsConfig
from tiny import tiny_model

NEW = 4
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 2,
}
SAMPLED = {**GREEDY, "do_sample": True, "top_k": 20}
# Two images, one, and none, longer than the sliding windows.
WORDS = ("ttiiiitttiiiit", "ttttiiiittt", "tttttttttt")


@pytest.fixture
def assistants(caplog: pytest.LogCaptureFixture) -> None:
    """Lets transformers call its own assistant in a way that it calls deprecated."""
    caplog.set_level(logging.ERROR, logger="transformers.generation.utils")


def mixed() -> dict[str, Tensor]:
    return batch(rows(*WORDS), "left")


def one() -> dict[str, Tensor]:
    """Assisted decoding takes a single row; this one repeats itself, so that look-ups find more."""
    inputs = batch([row("iiiittiiiittttttt")])
    inputs["input_ids"][0, -6:] = inputs["input_ids"][0, -3:].repeat(2)
    return inputs


def grown(inputs: dict[str, Tensor], token: Tensor) -> dict[str, Tensor]:
    """The batch with one more token a row."""
    new = {"input_ids": token, "attention_mask": torch.ones_like(token)}
    new["mm_token_type_ids"] = torch.zeros_like(token)
    return {k: torch.cat([v, new[k]], dim=1) if k in new else v for k, v in inputs.items()}


def by_hand(model: GraftedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Greedy decoding that recomputes everything for every token: ids `(b, s + NEW)`."""
    for _ in range(NEW):
        best = logits_of(model, inputs, **options)[:, -1].argmax(-1, keepdim=True)
        inputs = grown(inputs, best)
    return inputs["input_ids"]


@every_pair
def test_greedy(arch: str, method: str) -> None:
    """Rows with two images, one and none, padded on the left, from a dynamic and a static cache."""
    model, inputs = grafted(arch, method), mixed()
    expected = by_hand(model, inputs)
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    if method != "llava":
        static = model.generate(**inputs, **GREEDY, cache_implementation="static")
        assert torch.equal(static, expected)


@every_architecture
@pytest.mark.parametrize("method", ["iaa-c", "wings", "lora", "xattn"])
@pytest.mark.usefixtures("assistants")
def test_every_other_mode(arch: str, method: str) -> None:
    model, inputs = grafted(arch, method), mixed()
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    expected = model.generate(**inputs, **beams, use_cache=False)
    assert torch.equal(model.generate(**inputs, **beams), expected)

    def sampled(**options: Any) -> Tensor:
        torch.manual_seed(5)
        return model.generate(**inputs, **SAMPLED, num_return_sequences=2, **options)

    assert torch.equal(sampled(), sampled(use_cache=False))
    single = one()
    expected = by_hand(model, single)
    lookup = model.generate(**single, **GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(lookup, expected)
    drafted = model.generate(**single, **GREEDY, assistant_model=tiny_model(arch))
    assert torch.equal(drafted, expected)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("method", ["iaa-a", "iaa-c", "wings", "lora", "xattn"])
@pytest.mark.usefixtures("assistants")
def test_a_graft_drafts_for_a_graft(arch: str, method: str) -> None:
    """Drafts that are mostly right, so that the caches of both are cropped and go on."""
    model = grafted(arch, method)
    assistant = perturb(graft_on(arch, CONFIGS[method]))
    for parameter in assistant.workflows.parameters():
        parameter.data.mul_(1.01)
    options = {**GREEDY, "max_new_tokens": 10}
    expected = model.generate(**one(), **options)
    assert torch.equal(model.generate(**one(), **options, assistant_model=assistant), expected)


@every_method
def test_beams_without_a_cache_equal_a_search_by_hand(method: str) -> None:
    """Two tokens, all pairs tried: what the no-cache runs above are compared with is right."""
    model, inputs = grafted("llama", method), batch([row("ttiiiittt")])
    vocab = 40  # the beams' width; the best pair begins with one of the best first tokens
    first = logits_of(model, inputs)[0, -1].log_softmax(-1)
    scores, starts = first.topk(vocab)
    pairs = []
    for score, start in zip(scores, starts, strict=True):
        then = logits_of(model, grown(inputs, start[None, None]))[0, -1].log_softmax(-1)
        value, token = then.max(-1)
        pairs.append((float(score + value), [int(start), int(token)]))
    options = {**GREEDY, "max_new_tokens": 2, "num_beams": vocab}
    found = model.generate(**inputs, **options)[0, -2:].tolist()
    assert found == max(pairs)[1]


@pytest.mark.parametrize("method", ["iaa-c", "wings", "lora"])
def test_workflows_are_chosen_row_by_row(method: str) -> None:
    """Two grafts and the base in one batch of `generate`."""
    made = [
        perturb(graft_on("gemma2", CONFIGS[m], workflow=name), seed=seed)
        for seed, (name, m) in enumerate([("mm", "iaa-c"), ("grounding", method)], start=2)
    ]
    model = together(*made)
    inputs, names = mixed(), ["grounding", "mm", "text"]
    expected = by_hand(model, inputs, workflow=names)
    assert torch.equal(model.generate(**inputs, **GREEDY, workflow=names), expected)
    default = model.generate(**inputs, **GREEDY)
    assert not torch.equal(default[0], expected[0])
    assert torch.equal(default[1:], expected[1:])


@pytest.mark.parametrize("method", ["iaa-c", "wings", "lora"])
def test_a_row_without_an_image_in_the_grafts_workflow(method: str) -> None:
    model, inputs = grafted("llama", method), batch(rows("tttttttt", "ttttt"), "left")
    asked = by_hand(model, {**inputs, "mm_token_type_ids": inputs["input_ids"] * 0}, workflow="mm")
    assert torch.equal(model.generate(**inputs, **GREEDY, workflow="mm"), asked)
    text = plain("llama").generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), text)
    assert not torch.equal(asked, text)


@every_method
def test_pixels_and_embeddings_instead_of_ids(method: str) -> None:
    from tiny import tiny_tower

    model = perturb(GraftedModel.graft(tiny_model("llama"), tiny_tower(), CONFIGS[method]))
    inputs = batch(rows("ttiiiittt", "iiiittiiiitt"), "left")
    count = image_count(inputs["mm_token_type_ids"])
    pixels = torch.randn(count, 3, *model.vision_tower.image_size)
    with torch.no_grad():
        inputs["image_features"] = model.vision_tower(pixels)
    expected = by_hand(model, inputs)
    seen = {k: v for k, v in inputs.items() if k != "image_features"}
    assert torch.equal(model.generate(**seen, pixel_values=pixels, **GREEDY), expected)
    if method in ("wings", "llava", "lora", "xattn"):  # IAA's own embedding is not the base's
        ids = inputs.pop("input_ids")
        embeds = model.get_input_embeddings()(ids).detach()
        new = model.generate(inputs_embeds=embeds, **inputs, **GREEDY)
        assert torch.equal(new, expected[:, -NEW:])


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt_oss", "bloom"])
@pytest.mark.parametrize("method", ["iaa-c", "wings", "lora", "xattn"])
def test_a_dialogue_goes_on_from_its_cache(arch: str, method: str) -> None:
    """Three turns, a second image in the second one; each equals a run from scratch."""
    model = grafted(arch, method)
    cache = DynamicCache(config=model.base.config)
    turns = rows("ttiiiitt", "tttiiiittt", "ttttt")
    ids = torch.zeros(1, 0, dtype=torch.long)
    kinds, features = ids, turns[0].features[:0]
    for turn in turns:
        ids = torch.cat([ids, turn.ids[None]], dim=1)
        kinds = torch.cat([kinds, turn.kinds[None]], dim=1)
        features = torch.cat([features, turn.features])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": kinds,
            "image_features": features,
        }
        expected = by_hand(model, inputs)
        found = model.generate(**inputs, **GREEDY, past_key_values=cache)
        assert torch.equal(found, expected)
        ids = found
        kinds = torch.nn.functional.pad(kinds, (0, ids.shape[1] - kinds.shape[1]))


@pytest.mark.parametrize("method", ["iaa-c", "wings", "lora", "xattn"])
def test_caches_that_the_caller_made(method: str) -> None:
    model, inputs = grafted("llama", method), mixed()
    expected = by_hand(model, inputs)
    config = model.base.config
    for cache in (
        DynamicCache(),
        DynamicCache(config=config),
        StaticCache(config=config, max_cache_len=inputs["input_ids"].shape[1] + NEW),
    ):
        assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), expected)


def test_rows_stop_by_themselves() -> None:
    """A row that has ended is filled up while the others go on."""
    model, inputs = grafted("llama", "wings"), mixed()
    expected = by_hand(model, inputs)[:, -NEW:].tolist()
    end = expected[0][1]
    assert end not in expected[1]
    for line in expected:
        if end in line:
            line[line.index(end) + 1 :] = [2] * (NEW - 1 - line.index(end))
    found = model.generate(**inputs, **{**GREEDY, "eos_token_id": end})
    assert found[:, -NEW:].tolist() == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cache_implementation": "quantized"}, "quantized"),
        ({"cache_implementation": "paged"}, "paged"),
        ({"cache_implementation": "offloaded"}, "CUDA streams"),
        ({"cache_implementation": "offloaded_static"}, "CUDA streams"),
        ({"assistant_early_exit": 2}, "early-exit"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
    ],
)
@pytest.mark.parametrize("given", ["argument", "generation_config", "model"])
def test_modes_that_cannot_be_right_are_refused_by_name(
    options: dict[str, Any], says: str, given: str
) -> None:
    model = graft_on("llama", CONFIGS["iaa-c"])
    inputs = mixed()
    if given == "argument":
        call = {**GREEDY, **options}
    elif given == "generation_config":
        call = {"generation_config": GenerationConfig(**GREEDY, **options)}
    else:
        call = GREEDY
        for name, value in options.items():
            setattr(model.generation_config, name, value)
    with pytest.raises(UsageError, match=says):
        model.generate(**inputs, **call)


def test_other_things_that_are_refused() -> None:
    model, inputs = grafted("llama", "wings"), mixed()
    with pytest.raises(UsageError, match="continuous batching"):
        model.generate_batch([[1, 2]])
    with pytest.raises(UsageError, match="give input_ids"):
        model.generate(**GREEDY)
    offloaded = DynamicCache(config=model.base.config, offloading=True)
    with pytest.raises(UsageError, match="CUDA streams"):
        model.generate(**inputs, **GREEDY, past_key_values=offloaded)
    with pytest.raises(UsageError, match="row 0 has an image but runs the text workflow"):
        model.generate(**inputs, **GREEDY, workflow="text")
    short = graft_on("llama", WingsConfig(rank=2, max_length=16))
    with pytest.raises(UsageError, match="17 positions"):
        short.generate(**inputs, **GREEDY)


def test_the_official_variant_decodes_without_a_cache() -> None:
    config = OfficialWingsConfig(rank=4, system_prompt_length=2, image_token_length=4)
    model = perturb(graft_on("llama", config))
    inputs = batch([row("ttttiiiittttt")])
    assert torch.equal(model.generate(**inputs, **GREEDY), by_hand(model, inputs))
    with torch.no_grad():
        assert model(**inputs).past_key_values is None  # the default keeps none
        with pytest.raises(UsageError, match="use_cache=False"):
            model(**inputs, use_cache=True)
