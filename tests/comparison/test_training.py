"""Trainings in child processes: begun, gone on with, counted together, recorded."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmgraft.comparison import runner as training
from mmgraft.comparison.files import PhaseRecord, Session, read_phase, write_phase
from mmgraft.comparison.plan import ArmPlan, make_graft, make_plan
from mmgraft.comparison.runner import train_arm, training_command, training_results
from mmgraft.comparison.spec import load_comparison
from mmgraft.errors import MMGraftError
from mmgraft.recipes.source import dump_recipe
from mmgraft.runs.results import read_results
from mmgraft.training import checkpoint
from tiny_runs import losses

EARLIER = Session(began="x", seconds=100.0, cpu_seconds=50.0, peak_memory_mb=9999.0)


@pytest.fixture
def arm(write, tmp_path: Path) -> ArmPlan:
    plan = make_plan(load_comparison(write()), tmp_path / "out", device="cpu")
    arm = plan.arms[0]
    make_graft(plan, arm.recipe, arm.run)
    (arm.run / "recipe.yaml").write_text(dump_recipe(arm.recipe))
    return arm


def test_the_command_goes_on_where_there_is_something_to_go_on_with(tmp_path: Path) -> None:
    fresh = training_command(tmp_path, "cpu")
    assert fresh is not None
    assert fresh[:4] == [sys.executable, "-m", "mmgraft", "train"]
    assert "--resume" not in fresh
    progress = {"recipe": "r", "stages": ["a", "b"], "finished": []}
    checkpoint.write_progress(tmp_path, progress)
    assert training_command(tmp_path, "cpu") == fresh  # killed before anything was saved
    (tmp_path / "checkpoints/1-a/checkpoint-5").mkdir(parents=True)
    assert training_command(tmp_path, "cpu") == [*fresh, "--resume"]
    checkpoint.write_progress(tmp_path, {**progress, "finished": ["a"]})
    (tmp_path / "checkpoints/1-a/checkpoint-5").rmdir()
    assert training_command(tmp_path, "cpu") == [*fresh, "--resume"]
    checkpoint.write_progress(tmp_path, {**progress, "finished": ["a", "b"]})
    assert training_command(tmp_path, "cpu") is None


def test_an_arm_is_trained_and_what_it_cost_is_recorded(arm: ArmPlan, said: list[str]) -> None:
    record = train_arm(arm, PhaseRecord(phase="train", sessions=[EARLIER]), "cpu")
    assert record.done
    assert read_phase(arm.run, "train") == record
    assert len(losses(arm.run)) == 2
    section = read_results(arm.run, "training")
    assert section is not None
    assert section.graft["base"] == "base"  # the folder's name alone: results are pushed
    section = read_results(arm.run, "training")
    assert section is not None
    details = section.details
    assert details["sessions"] == 2
    assert details["seconds"] == 100.0 + record.sessions[1].seconds
    assert details["cpu_seconds"] == 50.0 + record.sessions[1].cpu_seconds
    assert details["peak_memory_mb"] == 9999.0
    assert details["peak_card_memory_mb"] is None
    assert details["steps"] == {"tune": 2}
    assert details["final_losses"] == {"tune": losses(arm.run)[-1][2]}
    assert details["trained_parameters"] == projector_size(arm.run)
    assert section.graft["method"] == "llava"
    # Killed after the last stage was saved and before that was noted: nothing is trained again.
    again = train_arm(arm, record.model_copy(update={"done": False}), "cpu")
    assert again == record
    assert len(losses(arm.run)) == 2
    assert not said


def projector_size(run: Path) -> int:
    from safetensors.torch import load_file

    tensors = load_file(run / "graft.safetensors")
    return sum(t.numel() for name, t in tensors.items() if "projector" in name)


def test_a_failed_training_says_so_and_its_time_counts(arm: ArmPlan, monkeypatch) -> None:
    codes = iter(["3", "-9"])

    def command(run: Path, device: str) -> list[str]:
        code = next(codes)
        ending = "raise SystemExit(3)" if code == "3" else "import os; os.kill(os.getpid(), 9)"
        return [sys.executable, "-c", ending]

    monkeypatch.setattr(training, "training_command", command)
    with pytest.raises(MMGraftError, match=r"'llava' ended with code 3.*same command goes on"):
        train_arm(arm, PhaseRecord(phase="train"), "cpu")
    record = read_phase(arm.run, "train")
    assert record is not None
    assert not record.done
    assert len(record.sessions) == 1
    with pytest.raises(MMGraftError, match="killed by signal 9"):
        train_arm(arm, record, "cpu")
    after = read_phase(arm.run, "train")
    assert after is not None
    assert len(after.sessions) == 2
    assert read_results(arm.run, "training") is None


def test_card_memory_is_the_largest_that_was_logged(arm: ArmPlan) -> None:
    (arm.run / "versions.json").write_text("{}")
    lines = [
        {"stage": "tune", "step": step, "loss": 1.0 / step, "memory_gb": gb}
        for step, gb in ((1, 2.097152), (2, 1.0))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "tu'
    (arm.run / "metrics.jsonl").write_text(text)
    found = training_results(arm, PhaseRecord(phase="train"), "cuda").details
    assert found["peak_card_memory_mb"] == pytest.approx(2000)
    assert found["final_losses"] == {"tune": 0.5}
    assert (
        training_results(arm, PhaseRecord(phase="train"), "cpu").details["peak_card_memory_mb"]
        is None
    )  # there the log holds main memory


KILLED = """
import os, signal, sys
from mmgraft.cli.app import run
from mmgraft.training import checkpoint
checkpoint.rotate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(run(sys.argv[1:]))
"""
"""A training that is killed when its first checkpoint is written."""


def test_a_killed_training_goes_on_from_its_checkpoint(
    write, tmp_path: Path, monkeypatch, said: list[str]
) -> None:
    spec = load_comparison(write(set={"stages.tune.max_steps": 60, "save_every": 10}))
    plan = make_plan(spec, tmp_path / "out", only=["llava"], device="cpu")
    arm = plan.arms[0]
    make_graft(plan, arm.recipe, arm.run)
    (arm.run / "recipe.yaml").write_text(dump_recipe(arm.recipe))
    command = training_command(arm.run, "cpu")
    assert command is not None
    at, *rest = command[1:3], *command[3:]
    assert at == ["-m", "mmgraft"]
    first = subprocess.run([sys.executable, "-c", KILLED, *rest], stdout=subprocess.DEVNULL)
    assert first.returncode == -signal.SIGKILL
    write_phase(arm.run, PhaseRecord(phase="train", sessions=[EARLIER]))
    train_arm(arm, PhaseRecord(phase="train", sessions=[EARLIER]), "cpu")
    assert said == ["llava: going on with a training that was stopped"]
    assert [step for _, step, _ in losses(arm.run)] == list(range(1, 61))


def test_steps_of_packed_rows_are_told_when_they_were_taken(write, tmp_path: Path) -> None:
    packed = {"stages.tune.max_steps": None, "stages.tune.packing": True, "log_every": 50}
    spec = load_comparison(write(set={**packed, "stages.tune.max_length": 128}))
    plan = make_plan(spec, tmp_path / "out", device="cpu")
    arm = plan.arms[0]
    make_graft(plan, arm.recipe, arm.run)
    (arm.run / "recipe.yaml").write_text(dump_recipe(arm.recipe))
    train_arm(arm, PhaseRecord(phase="train"), "cpu")
    progress = checkpoint.read_progress(arm.run)
    assert progress is not None
    steps = progress["steps"]["tune"]
    assert 1 <= steps < 3  # 9 rows alone are 3 batches of 4
    section = read_results(arm.run, "training")
    assert section is not None
    assert section.details["steps"] == {"tune": steps}
