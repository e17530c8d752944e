"""An exported model in a process that cannot import mmgraft gives what the graft gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmgraft import GraftedModel
from mmgraft.export.llava.export import export_llava
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import load_processor
from tiny_exports import conversations, make_graft, save_pictures
from waiting import LAST

ARCHS = ["llama", "qwen2", "qwen3", "mistral", "gemma3"]
TOWERS = ["clip", "siglip"]
PAIRS = [(arch, tower) for arch in ARCHS for tower in TOWERS]
NEW_TOKENS = 12

STOCK = """
import copy, importlib.abc, json, sys, warnings

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mmgraft":
            raise ImportError("mmgraft must not be used here")

sys.meta_path.insert(0, Blocker())
try:
    import mmgraft
except ImportError:
    pass
else:
    raise SystemExit("mmgraft can be imported")

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

todo = json.load(open(sys.argv[1]))
for folder in todo["folders"]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False).eval()
    exact = copy.deepcopy(model).double()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    assert type(model) is LlavaForConditionalGeneration
    made = {"ids": [], "logits": [], "pixels": []}
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        for messages in todo["conversations"]:
            inputs = processor.apply_chat_template(messages, **options)
            made["ids"].append(inputs["input_ids"])
            made["pixels"].append(inputs.get("pixel_values"))
            made["logits"].append(exact(**inputs).logits)
        texts = [
            processor.apply_chat_template(messages, add_generation_prompt=True)
            for messages in todo["conversations"]
        ]
        images = [
            [part["image"] for turn in messages if isinstance(turn["content"], list)
             for part in turn["content"] if part["type"] == "image"]
            for messages in todo["conversations"]
        ]
        batch = processor(
            text=texts, images=[path for row in images for path in row], padding=True,
            return_tensors="pt",
        )
        made["batch_ids"] = batch["input_ids"]
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        made["batch_logits"] = exact(**batch, position_ids=positions).logits
        said = model.generate(**batch, max_new_tokens=todo["new_tokens"], do_sample=False)
        said = said[:, batch["input_ids"].shape[1]:]
        made["texts"] = processor.batch_decode(said, skip_special_tokens=True)
    made["image_token_id"] = model.config.image_token_id
    torch.save(made, folder + ".pt")
assert not any(name.partition(".")[0] == "mmgraft" for name in sys.modules)
"""


@torch.no_grad()
def expected(run: Path, messages: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The same from the graft itself; every row runs its workflow, as an export's rows all do."""
    model = GraftedModel.from_pretrained(run)
    record = GraftFile.read(run)
    tower = model.vision_tower
    processor = load_processor(record, record.base.id, tower)
    singles = [processor(one) for one in messages]
    batch = processor(messages)
    said = model.generate(**batch, workflow="mm", max_new_tokens=NEW_TOKENS, do_sample=False)
    said = said[:, batch["input_ids"].shape[1] :]
    model.double()  # both sides in double precision: what is left is no rounding
    return {
        "inputs": singles,
        "batch": batch,
        "logits": [model(**inputs, workflow="mm").logits for inputs in singles],
        "batch_logits": model(**batch, workflow="mm").logits,
        "texts": [processor.decode(row) for row in said],
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """Every pair exported here, and run by one process without mmgraft."""
    folder = tmp_path_factory.mktemp("stock")
    messages = conversations(save_pictures(folder))
    found: dict[tuple[str, str], Any] = {}
    for arch, tower in PAIRS:
        run = make_graft(folder, arch, tower, name=f"{arch}-{tower}")
        exported = export_llava(run, folder / f"{arch}-{tower}-llava")
        found[arch, tower] = [expected(run, messages), exported]
    todo = {
        "folders": [str(exported.folder) for _, exported in found.values()],
        "conversations": messages,
        "new_tokens": NEW_TOKENS,
    }
    (folder / "todo.json").write_text(json.dumps(todo))
    command = [sys.executable, "-I", "-c", STOCK, str(folder / "todo.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LAST, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "not initialized" not in done.stderr
    for pair in found.values():
        pair.append(torch.load(f"{pair[1].folder}.pt"))
    return found


@pytest.mark.parametrize(("arch", "tower"), PAIRS)
def test_stock_transformers_gives_the_grafts_ids_and_pixels(
    results: dict[tuple[str, str], Any], arch: str, tower: str
) -> None:
    graft, _, stock = results[arch, tower]
    singles = [*zip(graft["inputs"], stock["ids"], strict=True)]
    for inputs, ids in [*singles, (graft["batch"], stock["batch_ids"])]:
        image = inputs["mm_token_type_ids"] == 1
        placed = torch.where(image, stock["image_token_id"], inputs["input_ids"])
        assert torch.equal(ids, placed)
    counts = [int((inputs["mm_token_type_ids"] == 1).sum()) for inputs in graft["inputs"]]
    assert counts == [4, 8, 0]
    for inputs, pixels in zip(graft["inputs"][:2], stock["pixels"], strict=False):
        torch.testing.assert_close(pixels, inputs["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("arch", "tower"), PAIRS)
def test_stock_transformers_gives_the_grafts_logits(
    results: dict[tuple[str, str], Any], arch: str, tower: str
) -> None:
    graft, exported, stock = results[arch, tower]
    for ours, theirs in zip(graft["logits"], stock["logits"], strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-9, rtol=0)
    shown = graft["batch"]["attention_mask"] == 1  # what stands at padding is nobody's
    ours, theirs = graft["batch_logits"][shown], stock["batch_logits"][shown]
    torch.testing.assert_close(theirs, ours, atol=1e-9, rtol=0)
    assert exported.difference <= 1e-5


@pytest.mark.parametrize(("arch", "tower"), PAIRS)
def test_stock_transformers_says_what_the_graft_says(
    results: dict[tuple[str, str], Any], arch: str, tower: str
) -> None:
    graft, _, stock = results[arch, tower]
    assert stock["texts"] == graft["texts"]
    if arch != "gemma3":  # tied and scaled, a random one says its last token for ever
        assert len(set(graft["texts"])) == 3
