"""Checkpoint folders: whole or not there, the newest kept, refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mmgraft.errors import MMGraftError, UsageError
from mmgraft.training import checkpoint


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    made[0].requires_grad_(False)
    return made


def write(folder: Path, step: int) -> Path:
    target = folder / f"checkpoint-{step}"
    checkpoint.write_checkpoint(target, lambda path: (path / "x").write_text(str(step)))
    return target


def test_order_is_by_number_and_strays_are_no_checkpoints(tmp_path):
    for step in (9, 10, 100):
        write(tmp_path, step)
    (tmp_path / "checkpoint-new").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    found = checkpoint.checkpoints(tmp_path)
    assert [checkpoint.step_of(path) for path in found] == [9, 10, 100]
    checkpoint.rotate(tmp_path, 2)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [10, 100]
    assert checkpoint.checkpoints(tmp_path / "nowhere") == []


def test_the_same_step_is_written_over(tmp_path):
    write(tmp_path, 1)
    checkpoint.write_checkpoint(
        tmp_path / "checkpoint-1", lambda path: (path / "y").write_text("new")
    )
    assert [path.name for path in (tmp_path / "checkpoint-1").iterdir()] == ["y"]


def test_a_save_that_fails_leaves_no_trace(tmp_path):
    run = tmp_path / "run"
    folder = checkpoint.stage_folder(run, 0, "align")
    write(folder, 1)

    def broken(path: Path) -> None:
        (path / "x").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(MMGraftError, match="checkpoint-1, is whole") as caught:
        checkpoint.write_checkpoint(folder / "checkpoint-2", broken)
    assert f"mmgraft train {run} --resume" in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_checkpoint(folder / "checkpoint-2", interrupted)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("says", "of_disk"),
    [
        ("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0", True),
        ("PytorchStreamWriter failed writing file data/0: file write failed", True),
        ("basic_ios::clear: iostream error", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: out of memory", False),
    ],
)
def test_only_what_a_disk_says_is_a_full_disk(tmp_path, says, of_disk):
    def failing(path: Path) -> None:
        raise RuntimeError(says)

    expected, match = (MMGraftError, "Make room") if of_disk else (RuntimeError, "^CUDA error")
    with pytest.raises(expected, match=match):
        checkpoint.write_checkpoint(tmp_path / "checkpoint-1", failing)


def test_what_a_kill_left_is_swept(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".checkpoint-2.abc").mkdir()
    checkpoint.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_only_trained_tensors_go_in_and_come_back(tmp_path):
    first, second = model(), model()
    checkpoint.save_tensors(checkpoint.trained_tensors(first), tmp_path)
    frozen = second[0].weight.clone()
    checkpoint.load_tensors(second, tmp_path)
    assert torch.equal(second[1].weight, first[1].weight)
    assert torch.equal(second[0].weight, frozen)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    first, other = model(), model()
    checkpoint.save_tensors(checkpoint.trained_tensors(first), tmp_path)
    other[1].bias.requires_grad_(False)
    with pytest.raises(UsageError, match=r"1\.bias is in only one"):
        checkpoint.load_tensors(other, tmp_path)
    (tmp_path / checkpoint.TENSORS).write_bytes(b"broken")
    with pytest.raises(UsageError, match="cannot be read"):
        checkpoint.load_tensors(first, tmp_path)


def test_progress_is_written_and_read(tmp_path):
    assert checkpoint.read_progress(tmp_path) is None
    checkpoint.write_progress(tmp_path, {"recipe": "r", "stages": ["a"], "finished": []})
    assert checkpoint.read_progress(tmp_path) == {"recipe": "r", "stages": ["a"], "finished": []}


def test_a_kill_while_a_step_is_written_again_loses_nothing(tmp_path, monkeypatch):
    """Between the two renamings neither has its name; the old one gets it back."""
    write(tmp_path, 1)
    original = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if not self.name.startswith("."):
            return original(self, target)
        raise SystemExit  # and what runs after it would not run after a kill

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(SystemExit):
        write(tmp_path, 1)
    monkeypatch.undo()
    (tmp_path / ".checkpoint-1.abc").mkdir()
    checkpoint.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "x").read_text() == "1"


def test_a_kill_while_one_is_removed_leaves_no_half_by_its_name(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # never begun
    checkpoint.rotate(tmp_path, 1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"]
    monkeypatch.undo()
    checkpoint.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
