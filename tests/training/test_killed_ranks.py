"""Two ranks of which one, or what started them, is killed: the finished run is the undisturbed one.

Rows are grouped by length, and an epoch ends in the middle of a step; GPT-2 has dropout.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmgraft.errors import UsageError
from mmgraft.training import checkpoint
from mmgraft.training.run import plan_training
from rank_work import go_on, train_runs
from ranks import on_ranks
from same_run import same
from tiny_runs import losses, make_run, write_recipe
from waiting import LAST, wait_until

STAGE = {
    "name": "tune", "train": ["projector", "graft"], "lr": 1e-3, "epochs": 5, "batch_size": 2,
    "accumulate": 2, "group_by": "length",
}  # fmt: skip
"""Nine rows with a picture: two steps an epoch, and a last batch that is filled up."""

KILLS = """
import os, signal, sys
from pathlib import Path

rank, step, whom, folder = sys.argv[1:5]
from mmgraft.cli.app import run
from mmgraft.training.trainer import GraftTrainer

original = GraftTrainer.training_step

def training_step(self, *args, **kwargs):
    if os.environ["RANK"] == rank and self.state.global_step + 1 == int(step):
        os.kill(os.getpid() if whom == "itself" else os.getppid(), signal.SIGKILL)
    return original(self, *args, **kwargs)

GraftTrainer.training_step = training_step
code = run(sys.argv[5:])
Path(folder, os.environ["RANK"] + ".ended").write_text(str(code))
sys.exit(code)
"""
LAUNCH = """
import sys
from mmgraft.cli import processes

processes.COMMAND = (sys.executable, "-c", *sys.argv[1:6])
sys.exit(processes.launch(2, sys.argv[6:]))
"""


def killed(run: Path, rank: int, step: int, whom: str, *more: str) -> tuple[int, str]:
    """Exit code of the launcher of a training that is killed in a step, and what it said."""
    kill = [KILLS, str(rank), str(step), whom, str(run.parent)]
    command = [sys.executable, "-c", LAUNCH, *kill, "train", str(run), "--device", "cpu", *more]
    said = run.parent / "said"
    with said.open("w") as file:  # no pipe: those who are left hold it open
        code = subprocess.run(command, stderr=file, stdout=file, timeout=LAST).returncode
    return code, said.read_text()


def steps_saved(run: Path) -> list[int]:
    folder = checkpoint.stage_folder(run, 0, "tune")
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(folder)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody ends with the launcher")
def test_one_rank_and_then_the_launcher_is_killed(
    dropout_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = [make_run(dropout_parts, tmp_path / name, "iaa") for name in ("whole", "run")]
    for run in runs:
        write_recipe(run, dropout_parts, "iaa", [STAGE], save_every=2)
    whole, run = runs
    on_ranks(train_runs, [str(whole)], 0, None)
    assert len(losses(whole)) == 10

    code, said = killed(run, 1, 6, "itself")
    assert code == 137, said
    assert "process 2 of 2 was ended by SIGKILL" in said
    assert "--resume" in said
    assert "Traceback" not in said, said
    assert steps_saved(run) == [2, 4]
    with pytest.raises(UsageError, match=r"in 2 processes, and this is 1.*--processes 2"):
        plan_training(run, resume=True, device="cpu")
    for ended in tmp_path.glob("*.ended"):
        ended.unlink()

    code, said = killed(run, 0, 7, "launcher", "--resume")
    assert code == -9, said
    wait_until(
        lambda: len(list(tmp_path.glob("*.ended"))) == 2, "the end of ranks without launcher"
    )
    assert {path.read_text() for path in tmp_path.glob("*.ended")} == {"130"}
    kept, last = steps_saved(run)
    assert kept in (6, 8)
    assert 7 <= last < 10  # the step was finished and saved; a busy machine may tell of it later

    on_ranks(go_on, str(run))
    same(run, whole)
