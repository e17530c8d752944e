"""No test depends on the clock: what happens elsewhere is waited for, however long it takes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
LOOKS = re.compile(r"\b(monotonic|perf_counter|process_time|time\.time|sleep)\(")

MAY_LOOK = {
    "support/waiting.py": "waits for events, with a last deadline",
    "support/hub_http.py": "the Hub's links expire in an hour",
    "comparison/test_child.py": "what a process used is compared with what it says it used",
    "model/test_saving.py": "chooses the moment of a kill, whatever it is",
    "unchanged/record.py": "a program that says how long a case took",
    "cli/test_processes.py": "scripts that wait to be ended",
    "sweep/__main__.py": "a program that waits for its processes",
    "sweep/judging.py": "a program that says how long a type took",
    "test_progress.py": "bars over work that takes a while",
    "mutation/patches/evaluation.py": "code of mmgraft",
    "mutation/__main__.py": "a program that says how long a bug took",
}
"""Files that look at a clock, and why no result depends on it."""

FILES = sorted(TESTS.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_nothing_is_expected_within_a_time(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(TESTS).as_posix()
    if name not in MAY_LOOK:
        assert not LOOKS.findall(text), "use waiting.wait_until"
    short = [given for given in deadlines(ast.parse(text)) if given < 1800]
    assert not short, "a last deadline is waiting.LAST"


def deadlines(tree: ast.Module) -> Iterator[float]:
    """Numbers that are given as a timeout."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "timeout":
            value = getattr(node.value, "value", None)
            yield from [value] if isinstance(value, int | float) else []


def test_the_list_has_no_more_than_it_needs() -> None:
    looking = {
        path.relative_to(TESTS).as_posix() for path in FILES if LOOKS.search(path.read_text())
    }
    assert set(MAY_LOOK) == looking
