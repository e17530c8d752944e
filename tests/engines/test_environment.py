"""`make engines` runs with the releases it pins, and llama.cpp starts here."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mmgraft
from llama_server import llama_server
from tiny import tiny_model
from tiny_gguf import write_gguf
from tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent


def pins() -> list[Requirement]:
    lines = (ROOT / "engines-packages.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("pin", pins(), ids=lambda pin: pin.name)
def test_every_package_is_the_pinned_release(pin: Requirement) -> None:
    assert version(pin.name).partition("+")[0] in pin.specifier


def test_mmgraft_is_the_checkout() -> None:
    assert Path(mmgraft.__file__).is_relative_to(ROOT)
    assert Path(sys.prefix).name != ".venv", "engines have an environment of their own"


def test_llama_cpp_reads_and_tokenises(tmp_path: Path) -> None:
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    text = "What colour is the square?"
    with llama_server(tmp_path / "tiny.gguf") as server:
        assert server.get("/health") == {"status": "ok"}
        given = server.post("/tokenize", content=text)["tokens"]
    assert given == tiny_tokenizer()(text)["input_ids"]
