"""Results of the benchmarks become tables, and tables stand where the page says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import page

MACHINE = {
    "processor": "P", "cores": 2, "memory_gb": 25, "threads": 1, "load": 0.1, "system": "Linux",
    "python": "3", "torch": "2", "transformers": "5",
}  # fmt: skip


def row(what: str, reached: bool | None, to_reach: str = "at most 1x") -> dict[str, object]:
    return {
        "what": what, "against": "b", "measured": "c", "to_reach": to_reach, "reached": reached
    }  # fmt: skip


def test_every_row_stands_in_its_section(tmp_path: Path) -> None:
    known = [
        page.Measurement("One", "first"),
        page.Measurement("One", "second", suffix="-x"),
        page.Measurement("Two", "third"),
        page.Measurement("Three", "not measured"),
    ]
    made = {
        "first": [row("f", True)],
        "second-x": [row("s", False), row("r", None, "reported")],
        "third": [row("t", None)],
    }
    for name, rows in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": MACHINE, "rows": rows}))
    text = page.tables(tmp_path, known)
    assert text.count("Machine:") == text.count("torch 2") == 1
    assert [line for line in text.splitlines() if line.startswith(("##", "| "))] == [
        "## One",
        "| what | against | measured | to reach | reached |",
        "| f | b | c | at most 1x | yes |",
        "| s | b | c | at most 1x | **no** |",
        "| r | b | c | reported | - |",
        "## Two",
        "| what | against | measured | to reach | reached |",
        "| t | b | c | at most 1x | not resolved |",
    ]


def test_what_stood_between_the_marks_goes() -> None:
    before = f"a\n{page.BEGIN}\nold\n{page.END}\nb\n"
    once = page.placed(before, "\nnew\n\n")
    assert once == f"a\n{page.BEGIN}\n\nnew\n\n{page.END}\nb\n"
    assert page.placed(once, "\nnew\n\n") == once
    with pytest.raises(SystemExit, match="marks"):
        page.placed("a page without them", "new")


def test_every_measurement_has_a_script_and_the_page_its_marks() -> None:
    for one in page.MEASUREMENTS:
        assert (page.HERE / f"{one.script}.py").is_file(), one.script
    names = [one.name for one in page.MEASUREMENTS]
    assert len(names) == len(set(names))
    text = page.PAGE.read_text(encoding="utf-8")
    assert text.count(page.BEGIN) == text.count(page.END) == 1
    for script in sorted(page.HERE.glob("*.py")):
        if "def main() -> int" in script.read_text(encoding="utf-8"):
            assert f"`{script.name}`" in text, f"{script.name} is not in the page"
