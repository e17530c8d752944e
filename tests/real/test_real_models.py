"""Real models: text is the base's, bit for bit, and makes sense; caches and 4-bit work as they do.

The tests of one precision stand together, so that a model is loaded once for all of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmgraft.evaluation.identity import PROMPTS, text_identity
from mmgraft.model.modeling import GraftedModel
from tiny_runs import make_rows
from tiny_towers import picture

SHORT = [PROMPTS[0], PROMPTS[3], "2 + 2 ="]
"""The second one speaks of an <image> tag."""

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
COLORS = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": picture(60, 50)},
            {"type": "text", "text": "Which colors do you see in this picture? Name the colors."},
        ],
    }
]
STEPS = 4
"""Tokens decoded one by one."""


def check_text(real: Any, method: str, dtype: str) -> None:
    """From strings to logits, a batch of two and a batch of one."""
    ours = real.answerer(method, dtype)
    assert ours.model.quantized == (dtype == "nf4")
    stock = real.stock(dtype)
    report = text_identity(ours.model, ours.processor, stock, real.tokenizer, SHORT)
    assert report.identical, report
    assert report.max_difference == 0.0
    assert report.prompts == 3
    assert report.positions > 15


def answers(real: Any, method: str, dtype: str, chat: list[dict[str, Any]], tokens: int = 8) -> str:
    """Return what the graft answers to text, which must be what the untouched base answers."""
    settings = {"max_new_tokens": tokens, "do_sample": False}
    ours = real.answerer(method, dtype).answers([chat], **settings)
    tokenizer = real.tokenizer
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(chat[0]["content"], return_tensors="pt")
    with torch.no_grad():
        out = real.stock(dtype).generate(**inputs, **settings)
    start = inputs["input_ids"].shape[1]
    assert ours[0] == tokenizer.decode(out[0][start:], skip_special_tokens=True).strip()
    return ours[0]


@torch.no_grad()
def off(model: Any, inputs: dict[str, Tensor]) -> float:
    """Largest difference between cached and full logits."""
    ids = inputs["input_ids"]
    full = model(**inputs, use_cache=False).logits
    start = ids.shape[1] - STEPS
    first = {name: value for name, value in inputs.items() if name == "pixel_values"}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            first[name] = inputs[name][:, :start]
    out = model(**first, use_cache=True)
    worst = (out.logits[:, -1] - full[:, start - 1]).abs().max().item()
    for at in range(start, ids.shape[1]):
        out = model(
            input_ids=ids[:, at : at + 1],
            attention_mask=inputs["attention_mask"][:, : at + 1],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        worst = max(worst, (out.logits[:, -1] - full[:, at]).abs().max().item())
    assert full.abs().max() > 5, "logits of a real model"
    return worst


def check_cache(real: Any, method: str, dtype: str) -> None:
    """Decoding an image row from a cache is as exact as the base's own decoding of the same ids."""
    ours = real.answerer(method, dtype)
    inputs = ours.processor(COLORS)
    assert int(inputs["mm_token_type_ids"].sum()) == ours.model.vision_tower.num_patches
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if dtype not in real.own:
        real.own[dtype] = off(real.stock(dtype), text)
    assert off(ours.model, inputs) <= 1.5 * real.own[dtype]


class TestSmolLM2:
    @pytest.mark.parametrize("method", ["iaa", "wings"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "nf4"])
    def test_text_and_cache(self, smollm2: Any, dtype: str, method: str) -> None:
        if dtype == "nf4":
            pytest.importorskip("bitsandbytes")
        check_text(smollm2, method, dtype)
        check_cache(smollm2, method, dtype)
        assert "Paris" in answers(smollm2, method, dtype, CAPITAL)

    def test_a_row_s_neighbours_and_its_picture(self, smollm2: Any) -> None:
        """In one batch with text and with the same words about another picture."""
        ours = smollm2.answerer("wings", "float32")
        words = COLORS[0]["content"][1]
        other = [{"role": "user", "content": [{"type": "image", "image": picture(which=1)}, words]}]
        text = [{"role": "user", "content": "Name three colors."}]
        chats = (COLORS, other, text)
        with torch.no_grad():
            logits = ours.model(**ours.processor(list(chats)), logits_to_keep=1).logits[:, -1]
            alone = [ours.model(**ours.processor([chat])).logits[0, -1] for chat in chats]
        for row, single in zip(logits, alone, strict=True):
            assert torch.allclose(row, single, atol=2e-4), (row - single).abs().max()
        assert not torch.allclose(logits[0], logits[1], atol=1e-2)

    def test_training_through_a_4_bit_base(self, smollm2: Any, tmp_path: Path, cli) -> None:
        """One step of each stage of the graft's recipe; text is still the 4-bit base's."""
        pytest.importorskip("bitsandbytes")
        run = Path(shutil.copytree(smollm2.grafts["iaa"], tmp_path / "run"))
        before = load_file(run / "graft.safetensors")
        rows = make_rows(tmp_path, count=4)
        ran = cli(
            *("train", run, "--data", rows, "--images", tmp_path / "images", "--max-steps", 1),
            *("--set", "quantization=nf4", "--set", "stages.*.accumulate=1"),
            *("--set", "stages.*.batch_size=2", "--set", "stages.*.lr=1e-3"),
            *("--set", "stages.*.warmup_ratio=0", "--json"),
        )
        assert ran.code == 0, ran.err
        stages = json.loads(ran.out)["stages"]
        assert [stage["steps"] for stage in stages] == [1, 1]
        assert all(0 < stage["loss"] < 20 for stage in stages)
        after = load_file(run / "graft.safetensors")
        moved = {
            name.split(".")[1] for name in before if not torch.equal(before[name], after[name])
        }
        assert moved == {"mlp", "layers", "norm"}
        assert not (run / "base").exists()

        model = GraftedModel.from_pretrained(run, quantization="nf4")
        ids = smollm2.tokenizer("The capital of France is", return_tensors="pt")
        with torch.no_grad():
            assert torch.equal(model(**ids).logits, smollm2.stock("nf4")(**ids).logits)


class TestGemma:
    """Sliding windows, a head size of its own, no chat template."""

    @pytest.mark.parametrize("method", ["iaa", "wings"])
    def test_text_and_cache_in_bf16(self, gemma: Any, method: str) -> None:
        check_text(gemma, method, "bfloat16")
        check_cache(gemma, method, "bfloat16")
        days = [{"role": "user", "content": "Monday, Tuesday, Wednesday,"}]
        assert "Thursday" in answers(gemma, method, "bfloat16", days, tokens=2)

    def test_text_in_fp32(self, gemma: Any) -> None:
        check_text(gemma, "wings", "float32")
