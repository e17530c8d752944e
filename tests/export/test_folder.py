"""Check which folder an export may write, and which graft it is of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmgraft.errors import UsageError
from mmgraft.export.folder import check_folder, default_folder, find_workflow
from mmgraft.model.files.graft_file import BaseReference, GraftFile, ImageToken
from mmgraft.vision.spec import VisionSpec


def write_record(folder: Path, workflow: str = "mm") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record = GraftFile(
        method="llava",
        config={"method": "llava"},
        workflow=workflow,
        base=BaseReference(id="acme/tiny"),
        vision=VisionSpec(id="acme/eye"),
        image_token=ImageToken(id=1),
    )
    (folder / "graft_config.json").write_text(record.dump())
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_record(tmp_path / "run")


def test_new_and_empty_folders_are_free(tmp_path: Path, run: Path) -> None:
    assert check_folder(tmp_path / "new" / "out", run, force=False) == tmp_path / "new" / "out"
    (tmp_path / "empty").mkdir()
    assert check_folder(tmp_path / "empty", run, force=False) == tmp_path / "empty"


def test_a_relative_path_becomes_whole(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_folder(default_folder(Path("run"), "llava"), run, False) == tmp_path / "run-llava"


def test_an_earlier_export_needs_force(tmp_path: Path, run: Path) -> None:
    llava, graft = tmp_path / "llava", write_record(tmp_path / "graft")
    llava.mkdir()
    (llava / "config.json").write_text(json.dumps({"mmgraft": {"version": "1"}}))
    for out in (llava, graft):
        with pytest.raises(UsageError, match=r"is not empty.*--force"):
            check_folder(out, run, force=False)
        assert check_folder(out, run, force=True) == out


@pytest.mark.parametrize("what", ["model", "run", "papers", "broken"])
def test_force_destroys_nothing_else(tmp_path: Path, run: Path, what: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if what == "run":
        write_record(out)
        (out / "metrics.jsonl").touch()
    elif what == "papers":
        (out / "thesis.tex").touch()
    else:
        (out / "config.json").write_text("{}" if what == "model" else "{")
    with pytest.raises(UsageError, match="something else than an earlier export"):
        check_folder(out, run, force=True)


def test_the_graft_the_current_folder_and_files_are_not_written_over(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in (run, tmp_path):
        with pytest.raises(UsageError, match="is or contains the graft"):
            check_folder(out, run, force=True)
    here = tmp_path / "here" / "below"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for out in (Path(), here.parent):
        with pytest.raises(UsageError, match="the current folder"):
            check_folder(out, run, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        check_folder(tmp_path / "file", run, force=True)


def test_a_workflow_is_the_runs_or_that_of_a_graft_below(run: Path) -> None:
    below = write_record(run / "grounding", "grounding")
    assert find_workflow(run, None) == run
    assert find_workflow(run, "mm") == run
    assert find_workflow(run, "grounding") == below
    with pytest.raises(UsageError, match=r"no workflow 'boxes'.*mm, grounding"):
        find_workflow(run, "boxes")
