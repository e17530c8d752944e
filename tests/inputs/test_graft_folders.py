"""Check what may stand in the folder of a graft or a run: used as it says, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from refusals import change

pytestmark = pytest.mark.xdist_group("bad-input")  # one worker makes the parts

RECORD, WEIGHTS, INDEX = "graft_config.json", "graft.safetensors", "graft.safetensors.index.json"
Spoil = Callable[[Path], str]


def text(name: str, content: bytes, word: str) -> Spoil:
    def spoil(run: Path) -> str:
        (run / name).write_bytes(content)
        return word

    spoil.__name__ = f"{name} {content[:24]!r}"
    return spoil


def field(word: str, **values: object) -> Spoil:
    def spoil(run: Path) -> str:
        change(run, **values)
        return word

    spoil.__name__ = f"{values}"[:60]
    return spoil


def a_folder(name: str, word: str) -> Spoil:
    def spoil(run: Path) -> str:
        (run / name).unlink()
        (run / name).mkdir()
        return word

    spoil.__name__ = f"{name} a folder"
    return spoil


def a_loop(name: str, word: str) -> Spoil:
    def spoil(run: Path) -> str:
        (run / name).unlink()
        (run / name).symlink_to(run / name)
        return word

    spoil.__name__ = f"{name} a loop"
    return spoil


def index(*names: object) -> Spoil:
    def spoil(run: Path) -> str:
        (run / WEIGHTS).unlink()
        data = {"metadata": {}, "weight_map": {str(at): name for at, name in enumerate(names)}}
        (run / INDEX).write_text(json.dumps(data))
        return "lacks" if names else "index.json is damaged"

    spoil.__name__ = f"index of {names}"
    return spoil


RECORDS: list[Spoil] = [
    *(text(RECORD, content, RECORD) for content in (b"", b"{", b"[]", b"null", b"[" * 100_000)),
    text(RECORD, '{"method": "é"}'.encode("utf-16"), "not UTF-8"),
    text(RECORD, '{"method": "é"}'.encode("latin-1"), "not UTF-8"),
    text(RECORD, b"{}", "method"),
    a_folder(RECORD, RECORD),
    a_loop(RECORD, RECORD),
    field("method", method=3),
    field("config", config=[]),
    field("base", base="acme/base"),
    field("base.id", base={"id": None}),
    field("workflow", workflow=["mm"]),
    field("image_token", image_token={"id": "x"}),
    field("projector", projector={"kind": "of_next_year"}),
    field("schema_version", schema_version="two"),
    field("colour", colour="blue"),
    field("template", template={"kind": "haiku"}),
]
TENSORS: list[Spoil] = [
    text(WEIGHTS, b"", "corrupt"),
    text(WEIGHTS, b"\xff" * 100, "corrupt"),
    text(WEIGHTS, b"<html>not found</html>", "corrupt"),
    a_folder(WEIGHTS, WEIGHTS),
    a_loop(WEIGHTS, WEIGHTS),
    index(),
    index("gone.safetensors"),
    index(3),
]


@pytest.mark.parametrize("spoil", [*RECORDS, *TENSORS], ids=lambda one: one.__name__)
def test_it_is_not_loaded(refused, run, spoil) -> None:
    says = spoil(run)
    for command in (["chat", run, "hello"], ["train", run]):
        said = refused(*command)
        assert says in said, said


RECIPES: list[Spoil] = [
    *(text("recipe.yaml", content, "recipe.yaml") for content in (b"", b"- a", b"\xff\xfea\0")),
    a_folder("recipe.yaml", "recipe"),
    a_loop("recipe.yaml", "recipe"),
]


@pytest.mark.parametrize("spoil", RECIPES, ids=lambda one: one.__name__)
def test_a_spoiled_recipe_is_not_trained_by(refused, run, spoil) -> None:
    says = spoil(run)
    said = refused("train", run)
    assert says in said, said


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"finished": 3}', b"[" * 100_000])
def test_a_spoiled_record_of_a_training_is_told(refused, run, content) -> None:
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "progress.json").write_bytes(content)
    for command in (["train", run], ["train", run, "--resume"]):
        said = refused(*command)
        assert "progress.json" in said, said
        assert "--restart" in said, said
