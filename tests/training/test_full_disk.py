"""A disk that is full, a real one: training stops, what was saved is whole, and it goes on exactly.

The disk is a small file system in memory, mounted where only the test's own process sees it.
"""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmgraft import atomic
from mmgraft.errors import MMGraftError
from mmgraft.training.callbacks import metrics
from mmgraft.training.run import plan_training, train
from same_run import same
from tiny_runs import make_run, write_recipe

PAGE = 4096
STAGES: list[dict[str, Any]] = [
    {"name": "align", "train": ["projector"], "graft_active": False, "lr": 1e-3, "max_steps": 2},
    {"name": "tune", "train": ["projector", "graft"], "lr": 1e-3, "max_steps": 6},
]

ON_A_SMALL_DISK = """
import json, os, shutil, subprocess, sys
from pathlib import Path

out, disk = Path(sys.argv[1]), Path(sys.argv[2])
room = json.loads(sys.argv[3])
mounted = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
if subprocess.run(mounted, capture_output=True).returncode:
    sys.exit(77)
run = disk / "run"
shutil.copytree(out, run)

from transformers import TrainerCallback
import mmgraft.cli.train, mmgraft.training.trainer as trainer
from mmgraft.cli.app import run as command

filler = disk / "filler"

class Fill(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if self.stage.name == "tune" and state.global_step == 3 and not filler.exists():
            free = os.statvfs(disk)
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - room)

original = trainer.GraftTrainer.__init__
def init(self, model, args, stage, *more, callbacks=(), **named):
    fill = Fill()
    fill.stage = stage
    original(self, model, args, stage, *more, callbacks=[fill, *callbacks], **named)
trainer.GraftTrainer.__init__ = init

code = command(["train", str(run), "--device", "cpu"])
saved = sorted(path.name for path in (run / "checkpoints/2-tune").iterdir())
filler.write_bytes(b"")  # room is made
again = command(["train", str(run), "--device", "cpu", "--resume"])
shutil.rmtree(out)
shutil.copytree(run, out)
(out.parent / "told.json").write_text(json.dumps([code, saved, again]))
"""


@pytest.fixture(scope="module")
def undisturbed(parts: Path, tmp_path_factory: Any) -> Path:
    run = make(parts, tmp_path_factory.mktemp("undisturbed") / "run")
    train(plan_training(run, device="cpu"))
    return run


def make(parts: Path, run: Path) -> Path:
    make_run(parts, run, "iaa")
    write_recipe(run, parts, "iaa", STAGES, save_every=2)
    return run


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system of its own")
def test_a_disk_that_is_full(parts: Path, tmp_path: Path, undisturbed: Path) -> None:
    """There is room for what is logged and for the begin of a checkpoint, but not for all of it."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare to mount a file system with")
    run = make(parts, tmp_path / "run")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", ON_A_SMALL_DISK,
         str(run), str(disk), str(3 * PAGE)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("no right to mount a file system")
    assert done.returncode == 0, done.stderr
    code, saved, again = json.loads((tmp_path / "told.json").read_text())
    assert code == 1, done.stderr
    assert "checkpoint-4 could not be written" in done.stderr
    assert "the one before, checkpoint-2, is whole" in done.stderr
    assert f"mmgraft train {disk / 'run'} --resume" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert saved == ["checkpoint-2"]
    assert again == 0, done.stderr
    same(run, undisturbed)


@pytest.mark.parametrize(
    ("owner", "name", "says"),
    [
        (metrics.MetricsFile, "on_log", "stage 'align' stopped"),
        (atomic, "_mode_of", "could not write"),  # of the graft, when a stage is trained
    ],
)
def test_wherever_it_is_met_the_way_on_is_said(
    parts: Path,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    says: str,
) -> None:
    run = make(parts, tmp_path / "run")
    plan = plan_training(run, device="cpu")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def from_now_on(*_: object) -> list[Any]:
        monkeypatch.setattr(owner, name, full)
        return []

    with pytest.raises(MMGraftError, match="No space left") as caught:
        train(plan, display=from_now_on)
    assert caught.value.exit_code == 1
    assert says in str(caught.value)
    assert f"go on with: mmgraft train {run} --resume" in str(caught.value)
    monkeypatch.undo()
    train(plan_training(run, device="cpu", resume=True))
    same(run, undisturbed)
