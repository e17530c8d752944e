"""Check what may stand in the folder of a vision tower: used as it says, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from refusals import GRAFT

pytestmark = pytest.mark.xdist_group("bad-input")  # one worker makes the parts

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
Spoil = Callable[[Path], str]


@pytest.fixture
def tower(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the good tower, outside of the folder that must not change."""
    return Path(shutil.copytree(parts / "tower", tmp_path_factory.mktemp("spoiled") / "tower"))


def text(name: str, content: bytes, word: str) -> Spoil:
    def spoil(tower: Path) -> str:
        (tower / name).write_bytes(content)
        return word

    spoil.__name__ = f"{name} {content[:24]!r}"
    return spoil


def keys(name: str, word: str, **values: Any) -> Spoil:
    def spoil(tower: Path) -> str:
        data = json.loads((tower / name).read_text())
        (tower / name).write_text(json.dumps({**data, **values}))
        return word

    spoil.__name__ = f"{name} {values}"[:70]
    return spoil


def gone(name: str, word: str) -> Spoil:
    def spoil(tower: Path) -> str:
        (tower / name).unlink()
        return word

    spoil.__name__ = f"no {name}"
    return spoil


def a_folder(name: str) -> Spoil:
    def spoil(tower: Path) -> str:
        (tower / name).unlink()
        (tower / name).mkdir()
        return name

    spoil.__name__ = f"{name} a folder"
    return spoil


def code_of_its_own(tower: Path) -> str:
    (tower / "own.py").write_text("import os\nos.mkdir('code-was-run')\nclass C: pass\n")
    data = {"model_type": "acme", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.C"}}
    (tower / CONFIG).write_text(json.dumps(data))
    return "never runs"


def processor_of_its_own(tower: Path) -> str:
    (tower / "own.py").write_text("import os\nos.mkdir('code-was-run')\nclass C: pass\n")
    mean = [0.5, 0.5, 0.5]
    data = {"image_processor_type": "C", "auto_map": {"AutoImageProcessor": "own.C"}}
    data |= {"size": {"height": 16, "width": 16}, "image_mean": mean, "image_std": mean}
    (tower / PROCESSOR).write_text(json.dumps(data))
    return "no image processor that works here"


SPOILED: list[Spoil] = [
    gone(CONFIG, "has no config.json"),
    a_folder(CONFIG),
    *(text(CONFIG, content, CONFIG) for content in (b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe")),
    text(CONFIG, b"{}", "configuration"),
    keys(CONFIG, "configuration", model_type="of_next_year"),
    keys(CONFIG, "", hidden_size="wide"),
    keys(CONFIG, "num_hidden_layers is -3", num_hidden_layers=-3),
    keys(CONFIG, "", patch_size=0),
    keys(CONFIG, "", image_size=None),
    code_of_its_own,
    a_folder(PROCESSOR),
    *(text(PROCESSOR, content, PROCESSOR) for content in (b"", b"{", b"[]", b"3", b"\xff\xfea")),
    text(PROCESSOR, '{"note": "é"}'.encode("latin-1"), "not UTF-8"),
    text(PROCESSOR, b"{}", PROCESSOR),
    keys(PROCESSOR, PROCESSOR, size="big"),
    keys(PROCESSOR, PROCESSOR, size={"shortest_edge": 10**6}),
    keys(PROCESSOR, PROCESSOR, crop_size={"height": 10**9, "width": 10**9}),
    keys(PROCESSOR, PROCESSOR, size={"shortest_edge": -4}),
    keys(PROCESSOR, PROCESSOR, image_mean=[0.5]),
    keys(PROCESSOR, PROCESSOR, image_std="none"),
    processor_of_its_own,
]


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda one: one.__name__)
def test_it_is_refused_at_graft(refused, parts, tower, here, spoil, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    says = spoil(tower)
    said = refused("graft", parts / "base", *GRAFT, "--vision", tower, "--out", "g")
    assert says in said, said
    assert not (here / "code-was-run").exists()


def cut(tower: Path) -> str:
    (tower / WEIGHTS).write_bytes((tower / WEIGHTS).read_bytes()[:-10])
    return "weights of vision tower"


def pointer(tower: Path) -> str:
    (tower / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
    return "weights of vision tower"


def a_tensor_less(tower: Path) -> str:
    tensors = load_file(tower / WEIGHTS)
    tensors.pop(next(name for name in tensors if "layers.0" in name))
    save_file(tensors, tower / WEIGHTS, metadata={"format": "pt"})
    return "lacks 1 weights"


class Runs:
    """Its pickle makes a folder where it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code-was-run",)


def as_bin(state: Any, name: str) -> Spoil:
    def spoil(tower: Path) -> str:
        torch.save(state, tower / "pytorch_model.bin")
        (tower / WEIGHTS).unlink()
        if state is None:
            (tower / "pytorch_model.bin").write_bytes(b"PK cut")
        return "weights of vision tower"

    spoil.__name__ = name
    return spoil


BINS = [as_bin(None, "bin cut"), as_bin({"a": Runs()}, "bin of code"), as_bin([1], "bin of a list")]


@pytest.mark.parametrize("spoil", [cut, pointer, a_tensor_less, gone(WEIGHTS, "weights of"), *BINS])
def test_damaged_weights_are_refused_where_they_are_loaded(
    cli, refused, parts, tower, here, spoil
) -> None:
    assert cli("graft", parts / "base", *GRAFT, "--vision", tower, "--out", "g").code == 0
    says = spoil(tower)
    rows, images = parts / "rows.jsonl", parts / "images"
    for command in (["chat", "g", "hello"], ["train", "g", "--data", rows, "--images", images]):
        said = refused(*command)
        assert says in said, said
    assert not (here / "code-was-run").exists()
