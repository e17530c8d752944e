"""docs/walk.md names files and functions; each of them exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(mmgraft/[^`]+)` \| ([^|]+) \|", re.MULTILINE)
NAME = re.compile(r"`([\w.]+)`")
STEPS = sorted({(path, name) for path, names in ROW.findall(PAGE) for name in NAME.findall(names)})


def defined(path: str) -> set[str]:
    """Functions and classes of a file, and ``Class.method`` of its methods."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            found |= {f"{node.name}.{each.name}" for each in inner}
    return found


@pytest.mark.parametrize(("path", "name"), STEPS)
def test_a_named_function_is_in_the_named_file(path: str, name: str) -> None:
    assert (ROOT / path).is_file(), path
    assert name in defined(path)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(mmgraft/[^`]+)`", PAGE))))
def test_a_named_file_is_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_row_of_the_tables_is_read() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) == len(ROW.findall(PAGE)) > 40
    assert all(NAME.findall(names) for _, names in ROW.findall(PAGE))
