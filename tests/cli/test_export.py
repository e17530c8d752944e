"""`mmgraft export`: one command line for every kind, its exit codes, and what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from gguf import GGUFReader

from mmgraft.export.folder import sizes_in
from mmgraft.export.llava import export as llava
from tiny_exports import ROUNDING, change_record, make_graft


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_graft(tmp_path, name="tiny-iaa")


def test_to_llava_by_default_beside_the_run(run: Path, cli) -> None:
    done = cli("export", "--to", "llava")
    assert done.code == 0, done.err
    folder = run.parent / "tiny-iaa-llava"
    assert f"written to {folder}" in done.out
    said = re.search(
        r"stock transformers gives the graft's logits: largest difference (\S+)", done.out
    )
    assert said is not None
    assert float(said[1]) < ROUNDING
    assert "taking the only graft here, tiny-iaa" in done.err
    assert "its text answers are no longer the base's" in done.err
    assert "Loading weights" not in done.err
    assert "model.safetensors" in done.out
    assert (folder / "config.json").is_file()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("graft", {"graft_config.json", "graft.safetensors", "README.md"}),
        ("full", {"graft_config.json", "base/config.json", "vision/config.json"}),
        ("llava", {"config.json", "model.safetensors", "processor_config.json", "README.md"}),
    ],
)
def test_json_is_all_that_stdout_gets(run: Path, cli, kind: str, expected: set[str]) -> None:
    done = cli("export", run, "--to", kind, "--out", "there", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["to"], told["workflow"], told["written"]) == (kind, "mm", True)
    assert {file["name"]: file["bytes"] for file in told["files"]} == sizes_in(Path("there"))
    assert expected <= {file["name"] for file in told["files"]}
    assert told["bytes"] == sum(file["bytes"] for file in told["files"])
    difference = told["largest_logit_difference"]
    assert (difference is None) == (kind != "llava")
    assert (difference or 0) < ROUNDING
    assert told["notes"]


@pytest.mark.parametrize("kind", ["graft", "full", "llava"])
def test_a_dry_run_writes_nothing(run: Path, cli, kind: str) -> None:
    before = sizes_in(run.parent)
    done = cli("export", run, "--to", kind, "--out", "there", "--dry-run")
    assert done.code == 0, done.err
    assert "would be written to" in done.out
    assert sizes_in(run.parent) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--to: graft, full, llava"),
        (["--to", "lava"], "did you mean 'llava'"),
        (["--to", "full", "--dtype", "bfloat16"], "--dtype goes with --to llava and vllm"),
        (["--to", "full", "--also", "x"], "--also goes with --to vllm"),
        (["--to", "llava", "--dtype", "int4"], "choose bfloat16, float32, float16"),
        (["--to", "llava", "--workflow", "boxes"], "no workflow 'boxes'"),
        (["--to", "llava", "--out", "."], "is or contains the graft"),
        (["--to", "llava", "--base", "nowhere/at/all"], "no folder 'nowhere/at/all'"),
    ],
)
def test_wrong_use_is_exit_2(run: Path, cli, options: list[str], told: str) -> None:
    before = sizes_in(run.parent)
    done = cli("export", run, *options)
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err
    assert sizes_in(run.parent) == before


def test_a_folder_in_use_needs_force(run: Path, cli) -> None:
    assert cli("export", run, "--to", "graft", "--out", "there").code == 0
    done = cli("export", run, "--to", "llava", "--out", "there")
    assert done.code == 2
    assert "--force" in done.err
    assert cli("export", run, "--to", "llava", "--out", "there", "--force").code == 0
    assert not Path("there/graft_config.json").exists()


def test_what_cannot_be_expressed_is_exit_2(run: Path, cli) -> None:
    change_record(run, config={"method": "iaa", "layers": [1], "structure": "a"})
    done = cli("export", run, "--to", "llava")
    assert done.code == 2
    assert "added through gates" in done.err
    assert "--to full" in done.err


def test_a_result_that_differs_is_exit_1(run: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmgraft.errors import MMGraftError

    def differs(*_: object) -> float:
        raise MMGraftError("it differs")

    monkeypatch.setattr(llava, "compare", differs)
    done = cli("export", run, "--to", "llava", "--out", "there")
    assert done.code == 1
    assert not Path("there").exists()


def test_a_graft_below_is_chosen_by_its_workflow(run: Path, cli) -> None:
    below = make_graft(run.parent, name="tiny-iaa/grounding", layers=[1])
    change_record(below, workflow="grounding")
    done = cli("export", run, "--to", "llava", "--workflow", "grounding", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["workflow"] == "grounding"
    text = json.loads(Path("tiny-iaa-llava/config.json").read_text())["text_config"]
    assert text["num_hidden_layers"] == 5


def test_a_hub_id_is_fetched(run: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(source: str) -> Path:
        asked.append(source)
        return run

    monkeypatch.setattr("mmgraft.model.files.load.graft_folder", fetch)
    assert cli("export", "me/tiny-iaa", "--to", "graft", "--out", "there").code == 0
    assert asked == ["me/tiny-iaa"]


def test_help_shows_a_command_to_copy(cli) -> None:
    done = cli("export", "--help")
    assert done.code == 0
    assert "mmgraft export qwen2-7b-iaa --to llava" in done.out
    assert "--dtype" in done.out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--to", "gguf", "--outtype", "q4_0"], "q8_0"),
        (["--to", "llava", "--outtype", "f16"], "--outtype goes with --to gguf"),
        (["--to", "gguf", "--dtype", "float16"], "--dtype goes with --to llava"),
        (["--to", "ggml"], "gguf"),
        (["--to", "gguf"], "issue 25814"),  # its tower is CLIP
    ],
)
def test_gguf_is_refused(run: Path, cli, arguments: list[str], reason: str) -> None:
    before = sizes_in(run.parent)
    done = cli("export", run, *arguments)
    assert done.code == 2
    assert reason in done.err
    assert sizes_in(run.parent) == before


@pytest.mark.parametrize(("kind", "method"), [("gguf", "iaa"), ("mmproj", "llava")])
def test_to_llama_cpp(tmp_path: Path, monkeypatch, cli, kind: str, method: str) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_graft(tmp_path, tower="siglip", method=method)
    done = cli("export", run, "--to", kind, "--outtype", "f32", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert {file["name"]: file["bytes"] for file in told["files"]} == sizes_in(Path(f"run-{kind}"))
    reader = GGUFReader(f"run-{kind}/mmproj.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    again = cli("export", run, "--to", kind)
    assert again.code == 2
    assert "--force" in again.err
    assert cli("export", run, "--to", kind, "--force").code == 0
