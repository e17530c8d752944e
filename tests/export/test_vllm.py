"""A folder for vLLM: the base once, each graft beside it; what the plugin cannot run is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmgraft.errors import UsageError
from mmgraft.export.vllm import export_vllm
from mmgraft.model.files.graft_file import GraftFile, TemplateChoice
from tiny_exports import change_record, make_base, make_graft


def named(folder: Path, name: str, arch: str = "llama", **options: Any) -> Path:
    run = make_graft(folder, arch, name=name, **options)
    change_record(run, workflow=name)
    return run


def test_the_base_is_there_once_and_every_graft_beside_it(tmp_path: Path) -> None:
    runs = [
        named(tmp_path, "boxes", layers=[0, 2]),
        named(tmp_path, "words", layers=[2, 3], structure="b", embedding=False),
        named(tmp_path, "plain", method="llava"),
    ]
    made = export_vllm(runs, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    boxes, words, plain = config["mmgraft"]["workflows"]
    assert made.workflow == "boxes, words, plain"
    assert config["architectures"] == ["MMGraftForConditionalGeneration"]
    assert config["text_config"]["num_hidden_layers"] == 4 + 4
    # 0, boxes 0; 1; 2, boxes 1, words 0; 3, words 1
    assert boxes["layers"] == [[0, 1], [3, 4]]
    assert words["layers"] == [[3, 5], [6, 7]]
    assert (boxes["gated"], words["gated"], plain["gated"]) == ("", "after", "")
    assert words["owns"] == ["head", "norm"]
    base = load_file(tmp_path / "llama" / "model.safetensors")
    for place, layer in ((0, 0), (2, 1), (3, 2), (6, 3)):
        for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight"):
            there = tensors.pop(f"language_model.model.layers.{place}.{name}")
            assert torch.equal(there, base[f"model.layers.{layer}.{name}"])
    for number, run, pairs in ((0, runs[0], (1, 4)), (1, runs[1], (5, 7))):
        own = load_file(run / "graft.safetensors")
        for k, place in enumerate(pairs):
            there = tensors[f"language_model.model.layers.{place}.self_attn.q_proj.weight"]
            assert torch.equal(there, own[f"graft.layers.{k}.self_attn.q_proj.weight"])
        beside = {name: one for name, one in own.items() if not name.startswith("graft.layers.")}
        for name, one in beside.items():
            assert torch.equal(tensors[f"workflows.{number}.{name.removeprefix('graft.')}"], one)
    assert torch.equal(tensors["language_model.model.norm.weight"], base["model.norm.weight"])
    rows = tensors["language_model.model.embed_tokens.weight"]
    assert torch.equal(rows, base["model.embed_tokens.weight"]), "no row is added for the image"
    assert not [name for name in tensors if "multi_modal_projector" in name]


def test_the_dry_run_knows_the_size(tmp_path: Path) -> None:
    run = named(tmp_path, "boxes", layers=[1])
    told = export_vllm([run], tmp_path / "out", dtype="bfloat16", dry_run=True)
    assert not (tmp_path / "out").exists()
    export_vllm([run], tmp_path / "out", dtype="bfloat16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert told.files["model.safetensors"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("arch", "options", "told"),
    [
        ("llama", {"method": "wings", "rank": 4}, "learners and a router"),
        ("llama", {"method": "lora"}, "what method lora adds"),
        ("llama", {"method": "xattn", "layers": [1]}, "xattn's blocks"),
        ("llama", {"method": "expert"}, "expert"),
        ("olmo2", {}, "knows no olmo2 decoder"),
        ("gpt_neox", {}, "knows no gpt_neox decoder"),
    ],
)
def test_what_the_plugin_cannot_run_is_refused(
    tmp_path: Path, arch: str, options: dict[str, Any], told: str
) -> None:
    run = make_graft(tmp_path, arch, **options)
    with pytest.raises(UsageError, match=told):
        export_vllm([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_quantised_base_is_refused_by_name(tmp_path: Path, dry_run: bool) -> None:
    """Forms that transformers loads; others are refused when they are grafted."""
    base = make_base(tmp_path, "llama")
    tensors = load_file(base / "model.safetensors")
    for name in (one for one in tensors if one.endswith("_proj.weight")):
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = base / "config.json"
    values = json.loads(config.read_text())
    values["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    config.write_text(json.dumps(values))
    run = make_graft(tmp_path, method="llava")
    with pytest.raises(UsageError, match=r"stored quantised \(fp8\), and what a graft copies"):
        export_vllm([run], tmp_path / "out", dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_grafts_that_cannot_share_a_base_are_refused(tmp_path: Path) -> None:
    first = named(tmp_path, "one")
    other_base = make_base(tmp_path / "other", "llama", seed=5)
    others = {
        "another base": named(tmp_path, "two", base=other_base),
        "another vision tower": named(tmp_path, "three", tower="siglip"),
        "another chat template": named(tmp_path, "four", template=TemplateChoice(kind="plain")),
    }
    for told, other in others.items():
        with pytest.raises(UsageError, match=told):
            export_vllm([first, other], tmp_path / "out")
    twice = named(tmp_path, "five")
    for name in ("one", "llama"):
        change_record(twice, workflow=name)
        with pytest.raises(UsageError, match="rename a workflow"):
            export_vllm([first, twice], tmp_path / "out")
    assert GraftFile.read(first).workflow == "one"
