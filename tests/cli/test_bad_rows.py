"""Rows, pictures and recipes that are no good: the row or the line is named, and all is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmgraft.grafts.registry import methods
from refusals import GRAFT

pytestmark = pytest.mark.xdist_group("bad-input")  # one worker makes the parts

# Images that are missing or broken


def row(number: int, content: Any, answer: str | None = "yes") -> str:
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return json.dumps({"id": f"row{number}", "messages": messages})


def image(name: object) -> list[dict[str, str]]:
    return [{"type": "image", "image": str(name)}, {"type": "text", "text": "what is it"}]


@pytest.fixture
def rows(here: Path, parts: Path) -> Callable[..., Path]:
    """Writes a data file of good rows with one bad one in their middle."""

    def write(bad: str, good: int = 6) -> Path:
        images = here / "images"
        images.mkdir()
        shutil.copy(parts / "images" / "0.png", images / "good.png")
        (images / "broken.png").write_bytes((images / "good.png").read_bytes()[:60])
        whole = bytearray((images / "good.png").read_bytes())
        whole[whole.index(b"IDAT") + 6] ^= 255  # both ends are in order
        (images / "spoilt.png").write_bytes(whole)
        (images / "page.png").write_text("<html>not found</html>")
        lines = [row(number, image("good.png")) for number in range(good)]
        lines.insert(good // 2, bad)
        (here / "rows.jsonl").write_text("\n".join(lines) + "\n")
        return here / "rows.jsonl"

    return write


@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_missing_image_names_the_row(refused, run, rows, command) -> None:
    data = rows(row(7, image("gone.png")))
    given = ["--data", data, "--images", "images"]
    if command == "generate":
        given = [data, "--images", "images", "--out", "out.jsonl"]
    said = refused(command, run, *given)
    assert "line 4 (id row7)" in said
    assert "gone.png" in said


@pytest.mark.parametrize("name", ["broken.png", "page.png"])
def test_a_broken_image_names_the_row(refused, run, rows, name) -> None:
    data = rows(row(7, image(name)))
    said = refused("generate", run, data, "--images", "images", "--out", "out.jsonl")
    assert "line 4 (id row7)" in said
    assert name in said
    said = refused("train", run, "--data", data, "--images", "images")
    assert f"{data}, line 4 (id row7): " in said
    assert name in refused("chat", run, "what", "--image", f"images/{name}")
    assert "nowhere.png" in refused("chat", run, "what", "--image", "nowhere.png")


@pytest.mark.parametrize("workers", [0, 1])
def test_training_stops_at_a_broken_image_and_keeps_what_it_has(cli, run, rows, workers) -> None:
    """It is found when its turn comes: the graft stays, the steps before are saved."""
    data = rows(row(7, image("spoilt.png")), good=12)
    graft = (run / "graft.safetensors").read_bytes()
    more = ["--set", f"workers={workers}", "--set", "stages.0.batch_size=1"]
    ran = cli("train", run, "--data", data, "--images", "images", "--max-steps", 13, *more)
    assert ran.code == 2
    assert f"{data}, line 7 (id row7): " in ran.err
    assert "spoilt.png" in ran.err
    assert "Traceback" not in ran.err
    assert (run / "graft.safetensors").read_bytes() == graft
    kept = [path.name for path in (run / "checkpoints" / "1-align").iterdir()]
    assert len(kept) == 1
    steps = kept[0].removeprefix("checkpoint-")
    assert f"saved after step {steps}" in ran.err
    assert f"mmgraft train {run} --resume" in ran.err
    shutil.copy("images/good.png", "images/spoilt.png")
    again = cli("train", run, "--resume")
    assert again.code == 0, again.err
    assert (run / "graft.safetensors").read_bytes() != graft


def test_the_feature_cache_finds_it_before_the_training(cli, run, rows) -> None:
    data = rows(row(7, image("spoilt.png")))
    options = ["--data", data, "--images", "images", "--set", "feature_cache=true"]
    ran = cli("train", run, *options)
    assert ran.code == 2
    assert "spoilt.png" in ran.err
    assert "id row7" in ran.err
    shutil.copy("images/good.png", "images/spoilt.png")
    again = cli("train", run, *options)  # nothing was trained, so nothing is in the way
    assert again.code == 0, again.err


# A row without a learnable token


@pytest.mark.parametrize("answer", [None, "", "  \n"])
def test_a_row_with_nothing_to_learn(refused, run, rows, answer) -> None:
    data = rows(row(7, image("good.png"), answer))
    said = refused("train", run, "--data", data, "--images", "images")
    assert f"{data}, line 4 (id row7): nothing to learn" in said


def test_a_row_whose_answer_is_cut_off(cli, run, rows) -> None:
    long = [*image("good.png"), {"type": "text", "text": "on and on " * 60}]
    data = rows(row(7, long))
    graft = (run / "graft.safetensors").read_bytes()
    more = ["--set", "stages.0.max_length=64", "--max-steps", 7]
    ran = cli("train", run, "--data", data, "--images", "images", *more)
    assert ran.code == 2
    assert "line 4 (id row7)" in ran.err
    assert "max_length" in ran.err
    assert (run / "graft.safetensors").read_bytes() == graft


# Recipes


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stages.0.learning_rate=1", "'lr'"),
        ("stages.0.batchsize=1", "'batch_size'"),
        ("sed=1", "'seed'"),
        ("stages.0.train=[projektor]", "projector"),
        ("stages.allign.lr=1", "'align'"),
    ],
)
def test_an_unknown_key_has_the_nearest_one(refused, run, setting, says) -> None:
    assert says in refused("train", run, "--set", setting)


def test_the_same_in_a_file_with_its_line(refused, run, parts) -> None:
    text = (run / "recipe.yaml").read_text().replace("lr:", "learnin_rate:")
    line = text[: text.index("learnin_rate")].count("\n") + 1
    (run / "recipe.yaml").write_text(text)
    for command in (["train", run], ["recipes", "validate", run / "recipe.yaml"]):
        said = refused(*command)
        assert f"line {line}" in said
        assert "learnin_rate" in said


def test_a_recipe_for_another_method(refused, run, parts) -> None:
    assert "recipe for wings" in refused("train", run, "--recipe", "wings")
    said = refused(
        "graft", parts / "base", *GRAFT, "--recipe", "wings", "--vision", parts / "tower"
    )
    assert "recipe for wings" in said


def test_an_unknown_recipe_or_method(refused, run, parts) -> None:
    assert "'wings'" in refused("train", run, "--recipe", "wing")
    said = refused("graft", parts / "base", "--method", "wing", "--vision", parts / "tower")
    assert "wings" in said
    assert all(name in refused("graft", parts / "base") for name in methods())
