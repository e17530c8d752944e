"""The rules of the house that no linter knows."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "mmgraft").rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


def test_no_file_is_named_after_nothing() -> None:
    empty = {"utils", "common", "helpers", "misc", "util", "helper"}
    assert not [name_of(path) for path in SOURCES if path.stem in empty]
    assert not [name_of(path) for path in SOURCES if path.stem.startswith("mm_")]
