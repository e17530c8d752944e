"""`mmgraft train`, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmgraft.cli.app import run as mmgraft
from tiny_runs import losses, make_parts, make_run, write_recipe
from waiting import LAST, wait_until

STAGE = {"name": "align", "train": ["projector"], "lr": 1e-3, "batch_size": 4, "max_steps": 2}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def here(shared: Path, tmp_path: Path, monkeypatch) -> Path:
    """A folder with one run, which is the current folder."""
    write_recipe(make_run(shared, tmp_path / "x-llava", "llava"), shared, "llava", [STAGE])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_with_no_argument_the_only_run_here_is_trained(here, capsys):
    assert mmgraft(["train"]) == 0
    err = capsys.readouterr().err
    assert "taking the only graft here, x-llava" in err
    assert "align: step 2/2, loss " in err
    assert "tokens/s" in err
    assert "mmgraft chat" in err
    assert len(losses(here / "x-llava")) == 2


def test_json_is_the_only_thing_on_stdout(here, capsys):
    assert mmgraft(["train", "x-llava", "--json", "--max-steps", "1", "--device", "cpu"]) == 0
    data = json.loads(capsys.readouterr().out)
    (stage,) = data["stages"]
    assert (stage["stage"], stage["steps"], stage["rows"]) == ("align", 1, 9)
    assert stage["text_rows_skipped"] == 3


def test_dry_run_says_what_would_be_done_and_writes_nothing(here, capsys):
    before = sorted(here.rglob("*"))
    assert mmgraft(["train", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "align" in out
    assert "projector" in out
    assert mmgraft(["train", "--dry-run", "--json", "--set", "stages.0.accumulate=3"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert (stage["rows_a_step"], stage["steps"]) == (12, 2)
    switches = ("packing=true", "max_length=64", "max_steps=null")
    packed = [part for one in switches for part in ("--set", f"stages.0.{one}")]
    assert mmgraft(["train", "--dry-run", "--json", *packed]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert (stage["rows_a_step"], stage["sequences_a_step"], stage["steps"]) == (None, 4, None)
    assert mmgraft(["train", "--dry-run", *packed]) == 0
    assert "4 packed" in capsys.readouterr().out
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "tpu"], "cuda, mps, cpu"),
        (["--recipe", "iaa"], "recipe for iaa"),
        (["--recipe", "lava"], "did you mean 'llava"),
        (["--set", "stages.align.learning_rate=1"], "'lr'"),
        (["--data", "nowhere.json"], "nowhere.json"),
        (["--read", "format=vqa"], "--data"),
        (["--data", "x.json", "--read", "layout=vqa"], "layout"),
        (["--resume"], "no training to go on with"),
        (["--set", "data.0.path=null"], "`data[0].path`"),
    ],
)
def test_wrong_use_is_code_2_and_says_what_to_do(here, capsys, arguments, says):
    before = sorted(here.rglob("*"))
    assert mmgraft(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert sorted(here.rglob("*")) == before


def test_a_trained_run_is_not_trained_again_by_mistake(here, capsys):
    assert mmgraft(["train"]) == 0
    assert mmgraft(["train"]) == 2
    assert "--restart" in capsys.readouterr().err
    assert mmgraft(["train", "--restart"]) == 0


def test_ctrl_c_saves_and_says_how_to_go_on(here):
    command = [sys.executable, "-m", "mmgraft", "train", "--set", "stages.0.max_steps=100000"]
    command += ["--set", "log_every=1"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=here)
    try:
        metrics = here / "x-llava" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text(), "the first step")
        os.kill(child.pid, signal.SIGINT)
        _, err = child.communicate(timeout=LAST)
    finally:
        child.kill()
    assert child.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    (saved,) = (here / "x-llava" / "checkpoints" / "1-align").iterdir()
    assert saved.name == f"checkpoint-{losses(here / 'x-llava')[-1][1]}"


def test_help_names_what_a_user_can_change(capsys):
    assert mmgraft(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--recipe", "--data", "--images", "--set", "--resume", "--dry-run", "--json"):
        assert option in out
    assert "mmgraft train qwen2-7b-iaa" in out
