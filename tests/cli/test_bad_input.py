"""Give wrong input, line by line: a message, exit code 2, nothing written or lost.

Rows and recipes are in test_bad_rows.py, damaged grafts in test_damaged_grafts.py, and what no one
is to blame for (a full disk, a kill) in test_bad_luck.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_fixtures import contents
from hub_server import HubServer
from refusals import GRAFT, on_the_hub
from waiting import LAST

pytestmark = pytest.mark.xdist_group("bad-input")  # one worker makes the parts

# Unknown alias or model


def test_an_unknown_alias_has_the_nearest_one(refused) -> None:
    assert "'qwen2-7b'" in refused("graft", "qwen2-7x", *GRAFT)
    assert "'smollm2-135m'" in refused("inspect", "smollm-135m")


@pytest.mark.parametrize(
    "command",
    [
        ["graft", "nobody/nothing", *GRAFT],
        ["inspect", "nobody/nothing"],
        ["chat", "nobody/nothing", "hello"],
        ["export", "nobody/nothing", "--to", "graft"],
        ["import", "nobody/nothing"],
    ],
    ids=lambda command: command[0],
)
def test_a_model_that_the_hub_does_not_have(refused, hub: HubServer, parts, command) -> None:
    vision = ["--vision", parts / "tower"] if command[0] == "graft" else []
    said = refused(*command, *vision)
    assert "nobody/nothing" in said
    assert "on the Hub" in said


@pytest.mark.parametrize("command", ["graft", "inspect", "chat", "train", "push", "export"])
def test_a_folder_that_is_not_there(refused, parts, command) -> None:
    more = {"graft": [*GRAFT, "--vision", parts / "tower"], "chat": ["hello"]}
    more["export"] = ["--to", "graft"]
    assert "./nowhere" in refused(command, "./nowhere/", *more.get(command, [])).replace(
        "folder nowhere", "./nowhere"
    )


def test_a_tower_that_is_not_there(refused, parts) -> None:
    assert "nowhere" in refused("graft", parts / "base", *GRAFT, "--vision", "./nowhere")


# Layers


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("22,24", "layer 22"),
        ("1,4", "layer 4"),
        ("0-9:2", "layer"),
        ("1,1", "layer 1"),
        ("0-2,1", "layer 1"),
        ("last:9", "9"),
        ("first", "first"),
        ("", "layers"),
    ],
)
def test_layers_that_are_not_there_or_twice(refused, parts, layers, says) -> None:
    said = refused("graft", parts / "base", "--method", "iaa", "--layers", layers, "--vision",
                   parts / "tower")  # fmt: skip
    assert says in said


def test_the_same_in_settings(refused, parts) -> None:
    settings = ["--method", "iaa", "--vision", parts / "tower", "--set"]
    assert "layer 7" in refused("graft", parts / "base", *settings, "layers=[1, 7]")
    assert "layer 2" in refused("graft", parts / "base", *settings, "layers=[2, 2]")


# A model that is no causal one


@pytest.mark.parametrize("kind", ["bert", "t5", "clip"])
def test_a_model_that_is_not_causal(refused, parts, tmp_path_factory, kind) -> None:
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp(kind)
    if kind == "bert":
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
        BertModel(BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).save_pretrained(
            folder
        )
    elif kind == "t5":
        sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "vocab_size": 32}
        T5ForConditionalGeneration(T5Config(**sizes, num_layers=2, num_heads=2)).save_pretrained(
            folder
        )
    else:
        folder = parts / "tower"
    said = refused("graft", folder, *GRAFT, "--vision", parts / "tower")
    assert kind in said.lower()
    assert "predicts the next token" in said


# A base that changed, also as a fine-tune with the same config


@pytest.fixture(scope="module")
def tuned(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with one value of one tensor changed."""
    folder = tmp_path_factory.mktemp("tuned") / "base"
    shutil.copytree(parts / "base", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.self_attn.q_proj.weight"][3, 3] += 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


CHANGED = "tensor 'model.layers.2.self_attn.q_proj.weight' holds other values"


@pytest.mark.parametrize(
    "command",
    [
        ["chat", "run", "hello"],
        ["generate", "run", "{rows}", "--out", "out.jsonl"],
        ["train", "run"],
        ["export", "run", "--to", "full"],
        ["export", "run", "--to", "llava"],
    ],
    ids=lambda command: " ".join(part for part in command if not part.startswith(("{", "--", "r"))),
)
def test_a_fine_tune_is_not_the_base(refused, run, parts, tuned, command) -> None:
    record = json.loads((run / "graft_config.json").read_text())
    record["base"]["id"] = str(tuned)
    (run / "graft_config.json").write_text(json.dumps(record))
    rows = parts / "rows.jsonl"
    images = ["--images", parts / "images"] if command[0] == "generate" else []
    said = refused(*[str(rows) if part == "{rows}" else part for part in command], *images)
    assert CHANGED in said
    assert str(tuned) in said


def test_a_base_with_another_config(refused, run, parts, tmp_path_factory) -> None:
    other = Path(shutil.copytree(parts / "base", tmp_path_factory.mktemp("x") / "base"))
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    said = refused("chat", run, "hello", "--base", other)
    assert "config field 'rms_norm_eps' was" in said


# An output that is there already


def test_an_output_folder_that_is_not_empty(refused, run, parts) -> None:
    said = refused("graft", parts / "base", *GRAFT, "--vision", parts / "tower", "--out", "run")
    assert "--force" in said


@pytest.mark.parametrize("to", ["graft", "full", "llava"])
def test_an_export_over_something_else(refused, run, here, to) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("mine")
    refused("export", run, "--to", to, "--out", "out")
    refused("export", run, "--to", to, "--out", "out", "--force")
    assert run.name in refused("export", run, "--to", to, "--out", run)


def test_an_answer_file_that_is_there(refused, run, parts, here) -> None:
    (here / "out.jsonl").write_text("mine")
    data = [parts / "rows.jsonl", "--images", parts / "images"]
    assert "--force" in refused("generate", run, *data, "--out", "out.jsonl")


def test_an_import_over_something_else(refused, run, here, golden) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("mine")
    source = next(path.parent for path in golden.rglob("config.json"))
    refused("import", source, "--out", "out")


# 4-bit without bitsandbytes, CUDA without CUDA

HIDDEN = """
import sys
class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition('.')[0] == 'bitsandbytes' else self.find(name, path, target)
    def find(self, *args):
        return self.finder.find_spec(*args)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path = [Hidden(finder) for finder in sys.meta_path]
from mmgraft.cli.app import run
rows, images = sys.argv[1:]
for command in (
    ["train", "run", "--set", "quantization=nf4"],
    ["train", "run", "--set", "stages.0.optimizer=adamw_8bit"],
    ["chat", "run", "hello", "--quantization", "nf4"],
    ["generate", "run", rows, "--images", images, "--out", "o", "--quantization", "nf4"],
):
    print("code", run(command), file=sys.stderr)
"""


def test_4_bit_without_bitsandbytes(run, here, parts) -> None:
    before = contents(here)
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, str(parts / "rows.jsonl"), str(parts / "images")],
        capture_output=True, text=True, cwd=here, timeout=LAST,
    )  # fmt: skip
    assert done.stderr.count("code 2\n") == 4, done.stderr
    assert done.stderr.count("pip install 'mmgraft[4bit]'") == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert contents(here) == before


def test_an_unknown_quantization(refused, run) -> None:
    assert "nf4" in refused("chat", run, "hello", "--quantization", "int8")
    assert "nf4" in refused("train", run, "--set", "quantization=fp4")


@pytest.mark.parametrize("command", ["train", "chat", "generate"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_without_cuda(refused, run, parts, command) -> None:
    more: dict[str, list[Any]] = {
        "train": [],
        "chat": ["hello"],
        "generate": [parts / "rows.jsonl", "--images", parts / "images", "--out", "out.jsonl"],
    }
    said = refused(command, run, *more[command], "--device", "cuda")
    assert "--device cpu" in said


# No token


def test_push_without_a_token(refused, run, hub: HubServer, monkeypatch) -> None:
    on_the_hub(run)
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused("push", run, "--yes")
    assert hub.requests == []
