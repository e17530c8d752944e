"""`mmgraft data`: ls and prepare, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmgraft.demo import assets
from mmgraft.demo.assets import Package
from mmgraft.demo.packaged import offers


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Language models are installed; easy-VQA is not."""
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(assets, "smollm2", lambda announce: folder)
    monkeypatch.setattr(
        Package, "folder", property(lambda self: None if self.name == "easy-vqa" else folder)
    )


def test_ls_says_what_there_is_and_what_is_missing(cli, packages) -> None:
    rows = json.loads(cli("data", "ls", "--json").out)["data"]
    assert [row["name"] for row in rows] == [offer.name for offer in offers()]
    missing = {row["name"]: row["missing"] for row in rows}
    assert missing["easy-vqa"] == ["easy-vqa"]
    assert missing["smollm2-135m"] == []
    shown = cli("data", "ls").out
    for row in rows:
        line = next(line for line in shown.splitlines() if line.startswith(f"{row['name']} "))
        assert (" no " if row["missing"] else " yes ") in line


def test_prepare_writes_and_says_what(cli, packages, tmp_path: Path) -> None:
    ran = cli("data", "prepare", "smollm2-135m", "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert said["written"] is True
    assert set(said["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    again = cli("data", "prepare", "smollm2-135m", "--out", tmp_path / "out")
    assert again.code == 2
    assert "--force" in again.err
    forced = cli("data", "prepare", "smollm2-135m", "--out", tmp_path / "out", "--force")
    assert forced.code == 0
    assert "Apache-2.0" in forced.err


def test_a_folder_by_the_name_when_none_is_given(cli, packages, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("data", "prepare", "smollm2-135m", "--dry-run").code == 0
    assert not (tmp_path / "smollm2-135m").exists()
    assert cli("data", "prepare", "smollm2-135m").code == 0
    assert (tmp_path / "smollm2-135m/config.json").is_file()


def test_a_missing_package_exits_2_with_the_line_to_run(cli, packages, tmp_path: Path) -> None:
    ran = cli("data", "prepare", "easy-vqa", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "pip install --no-deps easy-vqa" in ran.err
    assert "Traceback" not in ran.err


def test_an_unknown_name_exits_2(cli) -> None:
    ran = cli("data", "prepare", "smollm")
    assert ran.code == 2
    assert "did you mean 'smollm2-135m'" in ran.err


def test_options_of_stamps_reach_the_pictures(cli, tmp_path: Path) -> None:
    from PIL import Image

    from tiny_stamps import make_photographs, make_stamps

    make_stamps(tmp_path / "stamps")
    make_photographs(tmp_path / "photographs")
    asked = ["data", "prepare", "stamps-grounding", "--out", tmp_path / "out", "--json"]
    given = {
        "source": tmp_path / "stamps", "photos": tmp_path / "photographs", "size": 64, "seed": 5,
        "boxes": "thousand", "stamps": "3", "pictures": 2, "test-pictures": 1,
    }  # fmt: skip
    ran = cli(*asked, *(word for key, value in given.items() for word in (f"--{key}", value)))
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["rows"] == {
        "align.jsonl": 2, "train.jsonl": 2, "test.jsonl": 3, "seen.jsonl": 3,
    }  # fmt: skip
    with Image.open(tmp_path / "out/images/train/0.jpg") as picture:
        assert picture.size == (64, 64)
    answer = json.loads((tmp_path / "out/test.jsonl").read_text().splitlines()[0])
    assert max(map(int, answer["messages"][1]["content"].strip("[]").split(","))) > 100
    source = json.loads((tmp_path / "out/stamps-grounding.source.json").read_text())
    assert (source["seed"], source["options"]["stamps"]) == (5, "3")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["easy-vqa", "--size", "64"], "easy-vqa has no --size"),
        (["siqa", "--test-pictures", "4"], "siqa has no --test-pictures"),
        (["stamps-grounding", "--boxes", "percent"], "choose unit, thousand, pixel"),
        (["stamps", "--source", "nowhere"], "--source"),
    ],
)
def test_options_that_do_not_fit_exit_2(cli, tmp_path: Path, words: list[str], said: str) -> None:
    ran = cli("data", "prepare", *words, "--out", tmp_path / "out")
    assert ran.code == 2
    assert said in ran.err
    assert not (tmp_path / "out").exists()
