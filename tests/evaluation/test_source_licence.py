"""Pictures go along only where every licence is known to be free."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from box_example import GPL, make_boxes, state_licence
from mmgraft.evaluation.items.files import read_items
from mmgraft.evaluation.items.source_licence import FREE, stated_licences
from mmgraft.recipes.evaluation_set import SetSpec


def licences(spec: SetSpec) -> set[str | None]:
    return stated_licences(Path(str(spec.path)), read_items(spec))


@pytest.mark.parametrize(
    ("licence", "free", "allowed"),
    [("MIT", True, True), ("CC0", True, True), (GPL, False, False), (None, False, True)],
)
def test_the_source_file_beside_a_set_says_its_licence(
    tmp_path: Path, licence: str | None, free: bool, allowed: bool
) -> None:
    found = licences(make_boxes(tmp_path / "set", licence))
    assert found == {licence}
    assert (found <= FREE) is free
    assert (found <= {*FREE, None}) is allowed


def test_every_source_file_of_the_folder_counts(tmp_path: Path) -> None:
    spec = make_boxes(tmp_path / "set", "MIT")
    state_licence(tmp_path / "set", GPL, "stamps-grounding")
    assert licences(spec) == {"MIT", GPL}
    assert not licences(spec) <= {*FREE, None}


def test_a_file_that_was_put_there_or_changed_has_no_licence(tmp_path: Path) -> None:
    spec = make_boxes(tmp_path / "set", "MIT")
    file = Path(str(spec.path))
    copy = Path(shutil.copy(file, file.with_name("mine.jsonl")))
    assert not licences(spec.model_copy(update={"path": str(copy)})) <= FREE
    file.write_text(file.read_text() + "\n")
    assert not licences(spec) <= FREE


def test_a_free_file_does_not_free_pictures_of_another_folder(tmp_path: Path) -> None:
    spec = make_boxes(tmp_path / "set", "MIT")
    make_boxes(tmp_path / "gpl", GPL)
    shutil.rmtree(tmp_path / "set" / "images")
    moved = spec.model_copy(update={"images": str(tmp_path / "gpl")})
    assert licences(moved) == {"MIT", GPL}
    (tmp_path / "gpl" / "made.source.json").unlink()
    assert licences(moved) == {"MIT", None}


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_source_file_that_cannot_be_read_frees_nothing(tmp_path: Path, text: str) -> None:
    spec = make_boxes(tmp_path / "set")
    (tmp_path / "set" / "made.source.json").write_text(text)
    assert licences(spec) == {None}
