"""Stamps on white: no caption in both parts of a split, and rows that evaluation reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mmgraft.data.formats.sources import read_rows
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.files import read_items
from mmgraft.evaluation.items.item import Item
from mmgraft.recipes.evaluation_set import Metric, SetSpec
from stamp_set import StampSettings, category_of, draft, main, on_white
from stamps import Stamp
from tiny_stamps import make_stamps, save_stamp


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_stamps(tmp_path_factory.mktemp("stamps"))
    for kind in ("filled", "outlined"):
        for letter in "ab":
            path = folder / f"symbols/alphabets/english/{kind}/uppercase/{letter}_{kind}.png"
            save_stamp(path, f"The letter {letter.upper()}.", (30, 30), "black")
    path = folder / "symbols/alphabets/german/filled/uppercase/o.png"
    save_stamp(path, "The letter O with two dots.", (30, 30), "black")
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert make(out, source) == 0
    return out


def make(out: Path, source: Path, *more: str) -> int:
    return main(["--out", str(out), "--source", str(source), "--size", "64", *more])


def items(made: Path, name: str, metric: Metric) -> list[Item]:
    return read_items(SetSpec(name=name, path=str(made / f"{name}.jsonl"), metric=metric))


def answers(made: Path, name: str) -> dict[str, str]:
    rows = read_rows(made / f"{name}.jsonl")
    return {row.id: row.messages[1]["content"] for row in rows}


def test_no_caption_is_in_both_parts(made: Path) -> None:
    train = answers(made, "align")
    test = {item.id: item.answers[0] for item in items(made, "captions", "caption")}
    assert not {text.lower() for text in train.values()} & {text.lower() for text in test.values()}
    assert len(train) + len(test) == 30 + 3, "all that are no symbols, cut out or not"
    assert len(test) == round(0.2 * 33)
    assert test.keys() == {item.id for item in items(made, "categories", "choice")}
    assert train.keys() == answers(made, "tune").keys()


def test_a_category_is_the_right_one_of_all(made: Path) -> None:
    for item in items(made, "categories", "choice"):
        assert item.options == ("animals", "food", "town")
        assert item.gold is not None
        assert item.options[item.gold] == item.id.partition("/")[0] == item.kind
    for name, category in answers(made, "tune").items():
        assert name.startswith(category)
    assert category_of(Stamp("naturalforces/x", Path("x"), "")) == "natural forces"


def test_letters_are_trained_filled_and_tested_outlined(made: Path) -> None:
    assert sorted(answers(made, "letters").values()) == ["a", "b"]
    assert all("/filled/" in name for name in answers(made, "letters"))
    tested = items(made, "outlines", "exact")
    assert sorted(item.answers[0] for item in tested) == ["a", "b"]
    assert all("/outlined/" in item.id for item in tested)


def test_a_stamp_stands_in_the_middle_of_white(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 10), (255, 0, 0, 255)).save(tmp_path / "red.png")
    picture = on_white(Stamp("red", tmp_path / "red.png", "A red bar."), 64)
    assert picture.getpixel((32, 8)) == (255, 255, 255)
    assert [picture.getpixel((x, 32)) for x in (0, 63)] == [(255, 0, 0)] * 2
    assert [picture.getpixel((32, y)) for y in (16, 47)] == [(255, 0, 0)] * 2


def test_the_seed_decides_the_split(source: Path, made: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        assert make(tmp_path / name, source, "--seed", str(seed)) == 0
    for file in (path for path in made.rglob("*") if path.suffix in (".png", ".jsonl")):
        assert (tmp_path / "same" / file.relative_to(made)).read_bytes() == file.read_bytes()
    other = (tmp_path / "other/captions.jsonl").read_text()
    assert other != (made / "captions.jsonl").read_text()
    assert len(other.splitlines()) == 7


def test_a_folder_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    save_stamp(tmp_path / "food/a.png", "A pear.", (20, 20), "green")
    settings = StampSettings(tmp_path)
    with pytest.raises(UsageError, match="1 stamps of 1 categories"):
        draft(settings)
    with pytest.raises(UsageError, match="--size 10"):
        replace(settings, size=10)


def test_without_letters_there_are_no_files_of_letters(tmp_path: Path) -> None:
    stamps = make_stamps(tmp_path)
    assert "letters.jsonl" not in draft(StampSettings(stamps)).rows
    assert json.dumps(draft(StampSettings(stamps)).notes) == (
        '{"categories": ["animals", "food", "town"]}'
    )
