"""A file is the old one or the new one, whole, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmgraft.atomic import atomic_folder, atomic_json, atomic_text, atomic_write
from mmgraft.errors import MMGraftError, UsageError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_new_content_stands_in_the_end_and_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    atomic_json(target, {"is": "ä"})
    assert json.loads(target.read_text(encoding="utf-8")) == {"is": "ä"}
    atomic_text(target, "second")
    assert target.read_text() == "second"
    tensors = {"x": torch.arange(3.0)}
    atomic_write(tmp_path / "t.safetensors", lambda path: save_file(tensors, path))
    assert torch.equal(load_file(tmp_path / "t.safetensors")["x"], tensors["x"])
    assert names(tmp_path) == ["a.json", "t.safetensors"]


def test_the_old_file_is_seen_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")

    def writer(path: Path) -> None:
        path.write_text("new")
        assert path != target
        assert path.parent == target.parent  # a rename across file systems would not be one step
        assert target.read_text() == "old"

    atomic_write(target, writer)
    assert target.read_text() == "new"


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_whole(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    target.write_text("old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def writer(path: Path) -> None:
        path.write_text("ne")
        if step == "write":
            full()

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    if step == "replace":
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MMGraftError, match="No space left") as caught:
        atomic_write(target, writer)
    assert caught.value.exit_code == 1
    assert not isinstance(caught.value, UsageError)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_safetensors_own_error_is_one_of_ours(tmp_path: Path) -> None:
    def writer(path: Path) -> None:
        save_file({"x": torch.zeros(1)}, path / "not" / "a" / "folder")

    with pytest.raises(MMGraftError, match="could not write"):
        atomic_write(tmp_path / "a", writer)
    assert names(tmp_path) == []


def test_ctrl_c_leaves_no_half_file(tmp_path: Path) -> None:
    def writer(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a", writer)
    assert names(tmp_path) == []


def test_a_missing_folder_is_a_failure_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(MMGraftError, match="gone"):
        atomic_text(tmp_path / "gone" / "a", "x")


def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    plain, written = tmp_path / "plain", tmp_path / "written"
    plain.write_text("x")
    atomic_text(written, "x")
    assert written.stat().st_mode == plain.stat().st_mode
    written.chmod(0o640)
    atomic_text(written, "y")
    assert written.stat().st_mode & 0o777 == 0o640


def fill(content: str) -> Callable[[Path], None]:
    return lambda folder: atomic_text(folder / "a", content)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "base"
    atomic_folder(target, fill("old"))
    (target / "left-over").write_text("x")
    atomic_folder(target, fill("new"))
    assert names(target) == ["a"]
    assert (target / "a").read_text() == "new"
    assert names(tmp_path / "runs") == ["base"]
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("step", ["write", "fsync", "first rename", "second rename"])
def test_a_folder_that_cannot_be_written_leaves_the_old_one(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "base"
    atomic_folder(target, fill("old"))
    full = OSError(errno.ENOSPC, "No space left on device")
    rename, renamed = Path.replace, []

    def refuse(*args: object) -> None:
        raise full

    def count(path: Path, goal: Path) -> Path:
        if goal.name in ("base", ".base.old"):
            renamed.append(goal.name)
            if len(renamed) == (1 if step == "first rename" else 2):
                raise full
        return rename(path, goal)

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)
    if "rename" in step:
        monkeypatch.setattr(Path, "replace", count)
    with pytest.raises(MMGraftError, match="No space left"):
        atomic_folder(target, refuse if step == "write" else lambda p: (p / "a").write_text("new"))
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["base"]


def test_a_run_killed_between_the_two_renamings_is_mended(tmp_path: Path) -> None:
    target = tmp_path / "base"
    atomic_folder(target, fill("old"))
    target.rename(tmp_path / ".base.old")
    with pytest.raises(KeyboardInterrupt):
        atomic_folder(target, lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (target / "a").read_text() == "old"
