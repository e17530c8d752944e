"""Grounding pictures: boxes that are exact, splits that share no caption, always the same files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from grounding_set import (
    GroundingSettings,
    Layout,
    Placed,
    caption_row,
    draft,
    draw,
    lay_out,
    main,
    usable_stamps,
)
from mmgraft.cli.app import run as cli_main
from mmgraft.data.formats.sources import read_rows
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.files import read_items
from mmgraft.evaluation.metrics.boxes import iou, parse_box
from mmgraft.recipes.evaluation_set import SetSpec
from stamps import Stamp
from tiny_stamps import COLORS, THINGS, make_photographs, make_stamps


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> GroundingSettings:
    folder = tmp_path_factory.mktemp("grounding")
    return GroundingSettings(
        make_stamps(folder / "stamps"),
        make_photographs(folder / "photographs"),
        size=96,
        boxes="pixel",
        stamps="2-4",
        images=12,
        test_images=6,
    )


@pytest.fixture(scope="module")
def made(settings: GroundingSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for name, write in draft(settings).writers.items():
        write(folder / name)
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stamps_are_cut_out_short_of_caption_and_not_too_narrow(settings) -> None:
    stamps, cutouts = usable_stamps(settings)
    assert {stamp.phrase for stamp in stamps} == {f"the {c} {t}" for c in COLORS for t in THINGS}
    assert all(cutouts[stamp.name].size == (40, 30) for stamp in stamps)


@given(seed=st.integers(0, 10**6), counts=st.sampled_from(["1", "2", "3", "4", "1-4"]))
def test_boxes_lie_in_the_picture_apart_and_of_the_stamps_shape(seed: int, counts: str) -> None:
    stamps = [Stamp(f"s{at}", Path(f"s{at}.png"), f"A thing {chr(97 + at)}.") for at in range(9)]
    shapes = [(40, 30), (10, 30), (50, 50)]
    cutouts = {stamp.name: Image.new("RGBA", shapes[at % 3]) for at, stamp in enumerate(stamps)}
    settings = GroundingSettings(stamps=counts, seed=seed, size=96)
    layout = lay_out("train/0.jpg", stamps, cutouts, 5, settings)
    low, _, high = counts.partition("-")
    assert int(low) <= len(layout.placed) <= int(high or low)
    assert 0 <= layout.photograph < 5
    assert len({placed.stamp.phrase for placed in layout.placed}) == len(layout.placed)
    for at, placed in enumerate(layout.placed):
        x1, y1, x2, y2 = placed.box
        assert 0 <= x1 < x2 <= 96
        assert 0 <= y1 < y2 <= 96
        width, height = cutouts[placed.stamp.name].size
        assert (x2 - x1) / (y2 - y1) == pytest.approx(width / height, rel=0.2)
        assert max(x2 - x1, y2 - y1) >= 96 * 0.24
        assert all(iou(placed.box, other.box) == 0 for other in layout.placed[:at])


def test_a_stamp_is_drawn_in_its_box_and_nowhere_else() -> None:
    stamp = Stamp("a", Path("a.png"), "A thing.")
    photograph = Image.new("RGB", (100, 100), "white")
    layout = Layout("train/0.jpg", 0, (Placed(stamp, (10, 20, 50, 44)),), "seed")
    picture = draw(layout, {"a": Image.new("RGBA", (20, 12), (255, 0, 0, 255))}, photograph, 64)
    changed = ImageChops.difference(picture, Image.new("RGB", (64, 64), "white"))
    assert changed.getbbox() == (10, 20, 50, 44)
    clear = draw(layout, {"a": Image.new("RGBA", (20, 12), (255, 0, 0, 0))}, photograph, 64)
    assert clear.getbbox() == (0, 0, 64, 64)
    assert clear.getcolors() == [(64 * 64, (255, 255, 255))], "a clear stamp shows the photograph"


def test_test_captions_are_never_trained_on_and_seen_ones_are(made: Path) -> None:
    def phrases(name: str) -> set[str]:
        told = [row["messages"] for row in lines(made / name)]
        texts = [
            turn["content"] if isinstance(turn["content"], str) else turn["content"][1]["text"]
            for turns in told
            for turn in turns[::2]
        ]
        assert all(text.startswith("where is the ") and text.endswith("?") for text in texts)
        return set(texts)

    train, test, seen = phrases("train.jsonl"), phrases("test.jsonl"), phrases("seen.jsonl")
    assert not train & test
    assert not seen & test
    stamps = {f"where is the {c} {t}?" for c in COLORS for t in THINGS}
    assert train | test | seen <= stamps
    assert len(stamps - train - seen) >= 6, "a fifth of 30 captions are kept for the test"


def test_answers_say_the_box_and_evaluation_reads_it(made: Path) -> None:
    for name in ("test", "seen"):
        spec = SetSpec(name=name, path=str(made / f"{name}.jsonl"), metric="box", boxes="pixel")
        items = read_items(spec)
        assert len(items) >= 12
        assert len({item.group for item in items}) == 6
        for item in items:
            assert item.size == (96, 96)
            assert parse_box(item.answers[0], "pixel", item.size) == item.box
            assert item.kind in ("animals", "food")
            assert len(item.messages) == 1


def test_training_rows_ask_for_every_stamp_of_a_picture(made: Path) -> None:
    rows, records = read_rows(made / "train.jsonl"), lines(made / "train.jsonl")
    for row, record in zip(rows, records, strict=True):
        said = [turn["content"] for turn in row.messages[1::2]]
        boxes = [tuple(map(float, box)) for box in record["boxes"]]
        assert [parse_box(text, "pixel", (96, 96)) for text in said] == boxes
        assert Path(row.messages[0]["content"][0]["image"]).is_file()


def test_captions_go_from_left_to_right() -> None:
    def placed(phrase: str, x1: int, x2: int) -> Placed:
        return Placed(Stamp(phrase, Path("x.png"), f"A {phrase}."), (x1, 0, x2, 9))

    layout = Layout("train/7.jpg", 0, (placed("fox", 50, 60), placed("owl", 0, 70)), "")
    row = caption_row(layout, GroundingSettings(size=100, boxes="pixel"))
    fox, owl = (f"[{','.join(map(str, one.box))}]" for one in layout.placed)
    assert row["messages"][1]["content"] == f"the owl {owl} and the fox {fox}"
    assert row["messages"][0]["content"] == [{"type": "image", "image": "images/train/7.jpg"}]


def test_the_same_seed_gives_the_same_pictures(settings, made: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        for file, write in draft(replace(settings, seed=seed)).writers.items():
            write(tmp_path / name / file)
    files = [path.relative_to(made) for path in made.rglob("*") if path.is_file()]
    assert len(files) == 4 + 12 + 6 + 6
    assert all((tmp_path / "same" / f).read_bytes() == (made / f).read_bytes() for f in files)
    assert (tmp_path / "other/test.jsonl").read_bytes() != (made / "test.jsonl").read_bytes()


def test_more_pictures_keep_the_first_ones(settings, tmp_path: Path) -> None:
    for count in (3, 5):
        made = draft(replace(settings, images=count))
        made.writers["train.jsonl"](tmp_path / f"{count}.jsonl")
    assert lines(tmp_path / "3.jsonl") == lines(tmp_path / "5.jsonl")[:3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stamps": "5"}, "--stamps 5"),
        ({"stamps": "4-2"}, "--stamps 4-2"),
        ({"stamps": "two"}, "--stamps two"),
        ({"boxes": "percent"}, "--boxes percent"),
        ({"size": 16}, "--size 16"),
        ({"images": 0}, "--images"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, change: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(settings, **change)


def test_too_few_stamps_are_an_error_not_a_loop(settings, tmp_path: Path) -> None:
    for name in ("red_hat", "red_cup"):
        for ending in ("png", "txt"):
            inside = settings.source / f"animals/birds/{name}.{ending}"
            (tmp_path / inside.name).write_bytes(inside.read_bytes())
    with pytest.raises(UsageError, match=r"2 stamps .* are needed"):
        draft(replace(settings, source=tmp_path))


# The script


def run(settings: GroundingSettings, out: Path, *more: str) -> int:
    given = ["--out", out, "--source", settings.source, "--photos", settings.photos]
    return main([*map(str, given), "--images", "3", "--test-images", "2", "--size", "64", *more])


def test_the_script_writes_rows_that_data_check_reads(settings, tmp_path: Path, capfd) -> None:
    out = tmp_path / "out"
    assert run(settings, out, "--boxes", "thousand", "--stamps", "3", "--seed", "5") == 0
    rows = {"align.jsonl": 3, "train.jsonl": 3, "test.jsonl": 6, "seen.jsonl": 6}
    assert {name: len(lines(out / name)) for name in rows} == rows
    with Image.open(out / "images/seen/1.jpg") as image:
        assert image.size == (64, 64)
    (answer, *_) = lines(out / "test.jsonl")
    assert max(map(int, answer["messages"][1]["content"].strip("[]").split(","))) > 100
    said = json.loads((out / "stamps-grounding.source.json").read_text())
    assert said["stamps"] == {"train": 24, "test": 6}
    assert (said["seed"], said["options"]["stamps"], said["rows"]) == (5, "3", rows)
    assert said["licence"].startswith("GPL-2")
    capfd.readouterr()
    for name, count in rows.items():
        assert cli_main(["data", "check", str(out / name), "--json"]) == 0
        (check,) = json.loads(capfd.readouterr().out)["checks"]
        assert (check["rows"], check["images"]) == (count, count)


def test_the_script_says_what_is_wrong_and_writes_nothing(settings, tmp_path, capsys) -> None:
    assert run(settings, tmp_path / "out", "--boxes", "percent") == 2
    assert "choose unit, thousand, ten, pixel" in capsys.readouterr().err
    assert run(settings, tmp_path / "out", "--source", str(tmp_path)) == 2
    assert "--source" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(settings, tmp_path / "out") == 0
    assert run(settings, tmp_path / "out") == 2
    assert "--force" in capsys.readouterr().err
    assert run(settings, tmp_path / "out", "--force") == 0
