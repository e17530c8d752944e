"""Drawn scenes: answers are read again from the pixels, parts share no set of things."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmgraft.data.formats.sources import read_rows
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.files import read_items
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.metrics.answers import Prior
from mmgraft.recipes.evaluation_set import SetSpec
from shapes_set import ShapesSettings, main

PALETTE = {
    (220, 30, 30): "red",
    (40, 70, 220): "blue",
    (30, 160, 60): "green",
    (245, 210, 40): "yellow",
    (150, 50, 170): "purple",
    (20, 20, 20): "black",
}
WORDS = ["zero", "one", "two", "three", "four"]
Seen = dict[str, Any]


def make(out: Path, *more: str) -> int:
    return main(["--out", str(out), "--images", "60", "--test-images", "30", *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    assert make(out) == 0
    return out


def items(made: Path, part: str) -> list[Item]:
    return read_items(SetSpec(name=part, path=str(made / f"{part}.jsonl"), metric="exact"))


def seen(path: Path) -> list[Seen]:
    """The things of an image, from its pixels alone: what is not white, and how it fills."""
    pixels = np.asarray(Image.open(path))
    side = len(pixels) // 3
    found = []
    for row in range(3):
        for column in range(3):
            cell = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side]
            drawn = (cell != 255).any(-1)
            if not drawn.any():
                continue
            (color,) = {
                PALETTE[(int(one[0]), int(one[1]), int(one[2]))]
                for one in np.unique(cell[drawn], axis=0)
            }
            ys, xs = np.nonzero(drawn)
            width = int(np.ptp(xs)) + 1
            filled = drawn.sum() / (width * (np.ptp(ys) + 1))
            shape = "square" if filled > 0.95 else "circle" if filled > 0.65 else "triangle"
            where = {"x": column * side + xs.mean(), "y": row * side + ys.mean()}
            found.append({"color": color, "shape": shape, "width": width, **where})
    return found


def beside(one: Seen, side: str, other: Seen, cell: float) -> bool:
    """Tell whether one thing is to that side of another by more than half a cell."""
    axis, sign = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1),
                  "below": ("y", 1)}[side]  # fmt: skip
    return sign * (one[axis] - other[axis]) > cell / 2


def answer(question: str, things: list[Seen], cell: float) -> str:
    """The answer to a question, from what is seen."""

    def named(words: str) -> Seen:
        (found,) = (
            one
            for one in things
            if all(word in (one["color"], one["shape"]) for word in words.split())
        )
        return found

    if found := re.fullmatch(r"how many (\w+) shapes are there\?", question):
        return WORDS[sum(one["color"] == found[1] for one in things)]
    if found := re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", question):
        return "yes" if beside(named(found[1]), found[2], named(found[3]), cell) else "no"
    if found := re.fullmatch(r"are the (\w+) and the (\w+) of the same color\?", question):
        return "yes" if named(found[1])["color"] == named(found[2])["color"] else "no"
    if found := re.fullmatch(r"which is larger, the (.+) or the (.+)\?", question):
        return max(map(named, found.groups()), key=lambda one: one["width"])["shape"]
    where = r"(left of|right of|above|below) the (.+)\?"
    if found := re.fullmatch(rf"what (color is the shape|shape is) {where}", question):
        (there,) = (one for one in things if beside(one, found[2], named(found[3]), cell))
        return there[found[1].split()[0]]
    if found := re.fullmatch(r"what color is the (\w+)\?", question):
        return named(found[1])["color"]
    found = re.fullmatch(r"what shape is (\w+)\?", question)
    assert found is not None, question
    return named(found[1])["shape"]


@pytest.mark.parametrize("part", ["train", "test"])
def test_every_answer_is_what_the_pixels_show(made: Path, part: str) -> None:
    asked = items(made, part)
    assert {one.kind for one in asked} == {
        "count", "color", "shape", "side", "same", "larger", "color beside", "shape beside",
    }  # fmt: skip
    for one in asked:
        path = Path(one.messages[0]["content"][0]["image"])
        size = Image.open(path).width
        assert answer(one.question, seen(path), size / 3) == one.answers[0], (path, one.question)


def test_rows_to_train_on_ask_the_same_and_captions_name_what_is_seen(made: Path) -> None:
    single = defaultdict(list)
    for one in items(made, "train"):
        single[one.id.rsplit("-", 1)[0]].append((one.question, one.answers[0]))
    captions = {row.id: row.messages[1]["content"] for row in read_rows(made / "align.jsonl")}
    for row in read_rows(made / "tune.jsonl"):
        texts = [one["content"][-1]["text"] for one in row.messages[::2]]
        *pairs, last = zip(texts, (one["content"] for one in row.messages[1::2]), strict=True)
        assert pairs == single[row.id]
        assert last == ("what is where?", captions[row.id])
    for row in read_rows(made / "align.jsonl"):
        things = seen(Path(row.messages[0]["content"][0]["image"]))
        told = re.findall(r"\w+ \w+: (\w+) (\w+) (\w+)", captions[row.id])
        assert sorted(one[1:] for one in told) == sorted((t["color"], t["shape"]) for t in things)
        assert {one[0] == "big" for one in told} == {one["width"] > 38 for one in things}


def test_no_set_of_things_is_in_both_parts(made: Path) -> None:
    sets = {}
    for part, count in (("train", 60), ("test", 30)):
        paths = sorted((made / "images" / part).glob("*.png"))
        assert len(paths) == count
        sets[part] = {
            tuple(sorted((one["color"], one["shape"]) for one in seen(path))) for path in paths
        }
    assert not sets["train"] & sets["test"]
    assert {len(one) for one in sets["test"]} == {2, 3, 4}


def test_answers_of_a_kind_are_about_as_frequent_and_words_alone_say_little(made: Path) -> None:
    asked = {part: items(made, part) for part in ("train", "test")}
    for found in asked.values():
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for one in found:
            counts[str(one.kind)][one.answers[0]] += 1
        for kind, each in counts.items():
            assert max(each.values()) - min(each.values()) <= 3, (kind, each)
    prior = Prior((one.question, one.answers[0]) for one in asked["train"])
    right = [prior(one.question) == one.answers[0] for one in asked["test"]]
    assert np.mean(right) < 0.5


def test_the_seed_decides_everything(made: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        assert make(tmp_path / name, "--seed", str(seed)) == 0
    files = [path for path in made.rglob("*") if path.suffix in (".png", ".jsonl")]
    assert len(files) == 94
    for file in files:
        assert (tmp_path / "same" / file.relative_to(made)).read_bytes() == file.read_bytes()
    one, other = (folder / "test.jsonl" for folder in (made, tmp_path / "other"))
    assert one.read_text() != other.read_text()


def test_what_cannot_be_drawn_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--size 10"):
        ShapesSettings(size=10)
    assert make(made, "--test-images", "0") == 2
    assert "--test-images: give 1 or more" in capsys.readouterr().err
    assert make(made) == 2
    assert "is there already" in capsys.readouterr().err
