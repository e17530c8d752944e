"""Exports to LLaVA and PEFT in vLLM as it is: nothing of mmgraft is in the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmgraft.export.llava.export import export_llava
from mmgraft.export.peft import export_peft
from tiny_exports import make_base, make_graft
from vllm_engine import NEW, SIZES, Graft, Messages, answers, engine, for_vllm, greedy, image

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")  # of vLLM itself

DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3")
PAIRS = [(decoder, tower) for decoder in DECODERS for tower in ("clip", "siglip")]
TEXT: Messages = [{"role": "user", "content": "One, two, three: what comes next?"}]


def look(*seeds: int) -> Messages:
    parts: list[Any] = [{"type": "image", "image": image(16, seed)} for seed in seeds]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


@torch.no_grad()
def stock(folder: Path, rows: list[Messages]) -> list[tuple[list[int], list[int]]]:
    """Ids of each prompt, one for an image, and of transformers' greedy answer to it."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    found = []
    for row in rows:
        inputs = processor.apply_chat_template(
            row, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        made = model.generate(
            **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        ids = inputs["input_ids"][0].tolist()
        found.append((ids, made[0, len(ids) :].tolist()))
    return found


@pytest.mark.parametrize(("arch", "tower"), PAIRS)
def test_vllm_answers_as_transformers_does(tmp_path: Path, arch: str, tower: str) -> None:
    make_base(tmp_path, arch, **SIZES)
    export_llava(make_graft(tmp_path, arch, tower, layers=[0, 3]), tmp_path / "out")
    rows = [look(1), look(2, 3), TEXT]
    wanted = stock(tmp_path / "out", rows)
    with engine(tmp_path / "out") as llm:
        given = llm.chat([for_vllm(row) for row in rows], greedy(), use_tqdm=False)
    assert [list(one.prompt_token_ids) for one in given] == [ids for ids, _ in wanted]
    assert [ids for ids, _ in answers(given)] == [ids for _, ids in wanted]


def test_adapters_of_a_graft_with_gate_row_act_on_images_alone(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", **SIZES)
    run = make_graft(tmp_path, "llama", method="lora", rank=8)
    export_llava(run, tmp_path / "stock")
    export_peft(run, tmp_path / "adapter")
    with engine(base) as llm:
        alone = answers(llm.chat([TEXT], greedy(), use_tqdm=False))
    adapters = {"image": str(tmp_path / "adapter")}
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with engine(tmp_path / "stock", default_mm_loras=adapters, **options) as llm:
        rows = [look(4), TEXT]
        seen, beside = answers(llm.chat([for_vllm(r) for r in rows], greedy(), use_tqdm=False))
        llm.reset_prefix_cache()
        text = answers(llm.chat([TEXT], greedy(), use_tqdm=False))
    wanted = Graft(run).answer(look(4))
    assert seen[0] == wanted[0]
    assert seen[1] == pytest.approx(wanted[1], abs=2e-5)
    assert text[0][0] == beside[0] == alone[0][0]
    assert text == alone, "bit for bit"
