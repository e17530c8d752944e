"""Going on after a stop: exact to the bit, across stages, after a kill and on a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mmgraft.errors import MMGraftError, UsageError
from mmgraft.training import checkpoint
from mmgraft.training.callbacks.stopping import TrainingStopped
from mmgraft.training.run import plan_training, train
from tiny_runs import losses, make_run, write_recipe

# 9 rows with a picture: 5 batches, so 3 steps an epoch with accumulation; dropout draws numbers.
STAGES = [
    {
        "name": "align",
        "train": ["projector"],
        "graft_active": False,
        "lr": 1e-3,
        "epochs": 1,
        "batch_size": 2,
    },
    {
        "name": "tune",
        "train": ["projector", "graft"],
        "lr": {"projector": 1e-3, "default": 1e-4},
        "epochs": 2,
        "batch_size": 2,
        "accumulate": 2,
    },
]


class CtrlC(TrainerCallback):
    """Presses Ctrl-C in a step of a stage."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step
        self.now = ""

    def on_substep_end(self, args, state, control, **_):
        self._press(state.global_step + 1)

    def on_pre_optimizer_step(self, args, state, control, **_):
        self._press(state.global_step + 1)

    def _press(self, step: int) -> None:
        if (self.now, step) == (self.stage, self.step):
            self.step = -1
            os.kill(os.getpid(), signal.SIGINT)


def make(parts: Path, run: Path, method: str = "iaa", stages=STAGES, **recipe) -> Path:
    make_run(parts, run, method)
    write_recipe(run, parts, method, stages, **{"save_every": 1, **recipe})
    return run


def go(run: Path, press: CtrlC | None = None, **options) -> None:
    def display(stage, number, stages):
        if press is not None:
            press.now = stage.name
        return [] if press is None else [press]

    train(plan_training(run, **options), display=display)


@pytest.fixture(scope="module")
def whole(dropout_parts, tmp_path_factory) -> Path:
    """A run that nothing stopped."""
    run = make(dropout_parts, tmp_path_factory.mktemp("whole") / "run")
    go(run)
    return run


def same(run: Path, other: Path) -> None:
    mine, wanted = load_file(run / "graft.safetensors"), load_file(other / "graft.safetensors")
    assert mine.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(mine[name], wanted[name]), name
    assert losses(run) == losses(other)


def test_whole_run_leaves_nothing_behind(whole):
    assert [(s, n) for s, n, _ in losses(whole)] == [
        *[("align", n) for n in range(1, 6)],
        *[("tune", n) for n in range(1, 7)],
    ]
    left = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert left == ["progress.json", "rows.json"]
    saved = json.loads((whole / "graft_config.json").read_text())
    assert saved["recipe"]["stages"][1]["text_rows"] == "skip"
    assert saved["base_trained"] is False
    assert "torch" in json.loads((whole / "versions.json").read_text())


@pytest.mark.parametrize(
    ("stage", "step"), [("align", 2), ("align", 5), ("tune", 1), ("tune", 3), ("tune", 5)]
)
def test_a_stopped_run_goes_on_to_the_bit(dropout_parts, tmp_path, whole, stage, step):
    run = make(dropout_parts, tmp_path / "run")
    with pytest.raises(TrainingStopped) as stopped:
        go(run, CtrlC(stage, step))
    assert stopped.value.exit_code == 130
    assert f"mmgraft train {run} --resume" in str(stopped.value)
    torch.manual_seed(4321)  # what a new process has drawn must not matter
    go(run, resume=True)
    same(run, whole)


def test_ctrl_c_before_the_first_save_goes_back_to_the_stage(dropout_parts, tmp_path, whole):
    run = make(dropout_parts, tmp_path / "run", save_every=None)
    with pytest.raises(TrainingStopped):
        go(run, CtrlC("tune", 2))
    assert len(list((run / "checkpoints" / "2-tune").glob("checkpoint-*"))) == 1
    go(run, resume=True)
    same(run, whole)


def test_checkpoints_hold_only_what_is_trained(dropout_parts, tmp_path):
    run = make(dropout_parts, tmp_path / "run", keep_checkpoints=2)
    with pytest.raises(TrainingStopped):
        go(run, CtrlC("tune", 4))
    found = checkpoint.checkpoints(run / "checkpoints" / "2-tune")
    assert [checkpoint.step_of(path) for path in found] == [3, 4]
    tensors = load_file(found[-1] / checkpoint.TENSORS)
    assert tensors
    assert all(name.startswith("workflows.mm.") for name in tensors)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


SCRIPT = """
import os, signal, sys
from pathlib import Path
import mmgraft.training.{module} as module
from mmgraft.training.run import plan_training, train

original = module.{name}
calls = 0

def killed(*args, **kwargs):
    global calls
    calls += 1
    if calls == {call}:
        {before}
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

module.{name} = killed
train(plan_training(sys.argv[1], resume="--resume" in sys.argv))
"""


def killed(run: Path, module: str, name: str, call: int, before: str = "pass") -> None:
    script = SCRIPT.format(module=module, name=name, call=call, before=before)
    done = subprocess.run([sys.executable, "-c", script, str(run)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


HALF = "(args[1] / 'trained.safetensors').write_bytes(b'half')"


@pytest.mark.parametrize(
    ("module", "name", "call", "before"),
    [
        ("checkpoint", "save_tensors", 3, HALF),  # in the middle of the third checkpoint
        ("session", "save_graft", 1, "pass"),  # a stage is trained but its graft not yet written
        ("session", "save_graft", 2, "original(*args, **kwargs)"),  # written but not yet noted
    ],
)
def test_a_kill_in_a_save_leaves_the_old_one_whole(
    dropout_parts, tmp_path, whole, module, name, call, before
):
    run = make(dropout_parts, tmp_path / "run")
    killed(run, module, name, call, before)
    go(run, resume=True)
    same(run, whole)
    assert not [p for p in run.rglob("*") if p.name.startswith(".")]


def test_a_full_disk_is_told_and_the_old_checkpoint_stays(parts, tmp_path, monkeypatch):
    run = make(parts, tmp_path / "run")
    calls = []

    def full(tensors, path, **_):
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return original(tensors, path, **_)

    original = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(MMGraftError, match="No space left") as caught:
        go(run)
    assert caught.value.exit_code == 1
    assert "checkpoint-2, is whole" in str(caught.value)
    names = {path.name for path in (run / "checkpoints" / "1-align").iterdir()}
    assert names == {"checkpoint-1", "checkpoint-2"}
    monkeypatch.undo()
    go(run, resume=True)


def test_a_file_size_limit_fails_the_save_and_not_the_run_folder(parts, tmp_path):
    run = make(parts, tmp_path / "run")
    before = (run / "graft.safetensors").read_bytes()
    script = """
import resource, signal, sys
sys.dont_write_bytecode = True  # it would be cut short too, and break later imports
from mmgraft.cli.app import run
import torch, transformers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
sys.exit(run(["train", sys.argv[1]]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(run)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert (run / "graft.safetensors").read_bytes() == before


# What may not be begun or gone on with


def test_second_trainings_are_asked_for_by_name(parts, tmp_path):
    run = make(parts, tmp_path / "run")
    with pytest.raises(UsageError, match="no training to go on with"):
        go(run, resume=True)
    with pytest.raises(TrainingStopped):
        go(run, CtrlC("tune", 1))
    with pytest.raises(UsageError, match=r"stopped in stage 'tune'.*\n?.*--resume"):
        go(run)
    with pytest.raises(UsageError, match="leave --recipe, --set"):
        go(run, resume=True, overrides=["seed=1"])
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((parts / "rows.jsonl").read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UsageError, match=r"'tune' now has 11 rows, and .* begun with 12"):
        go(run, resume=True, data=[str(fewer)], images=str(parts / "images"))
    go(run, resume=True)
    with pytest.raises(UsageError, match="trained already"):
        go(run)
    first = losses(run)
    go(run, restart=True, max_steps=1)
    assert len(losses(run)) == 2
    kept = [json.loads(line) for line in (run / "metrics-1.jsonl").read_text().splitlines()]
    assert len(kept) == len(first)
    said: list[str] = []
    assert train(plan_training(run, resume=True), announce=said.append) == []
    assert "all stages" in said[0]


def test_a_checkpoint_of_another_stage_is_refused(parts, tmp_path):
    run = make(parts, tmp_path / "run")
    with pytest.raises(TrainingStopped):
        go(run, CtrlC("align", 2))
    used = run / "recipe.used.yaml"
    text = used.read_text().replace("- projector\n", "- layers\n", 1)
    used.write_text(text.replace("graft_active: false", "graft_active: true"))
    with pytest.raises(UsageError, match="another stage or graft"):
        go(run, resume=True)


def test_a_corrupt_progress_file_is_told(parts, tmp_path):
    run = make(parts, tmp_path / "run")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "progress.json").write_text("{")
    with pytest.raises(UsageError, match="corrupt"):
        go(run)


def test_paths_are_remembered_from_any_folder(parts, tmp_path, monkeypatch):
    run = make(parts, tmp_path / "run", data=[])
    monkeypatch.chdir(parts)
    with pytest.raises(TrainingStopped):
        go(run, CtrlC("align", 1), data=["rows.jsonl"], images="images")
    monkeypatch.chdir(tmp_path)
    go(run, resume=True)
    assert losses(run)[-1][:2] == ("tune", 6)
