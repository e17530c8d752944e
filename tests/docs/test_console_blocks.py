"""Every command that a page shows is run, and prints what the page says; see docs/console.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from console import (  # noqa: E402
    Block,
    Command,
    differences,
    prepare,
    read_blocks,
    read_commands,
    run_command,
)

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def pages_with_commands() -> list[Path]:
    return [page for page in PAGES if "\n```console\n" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", pages_with_commands(), ids=lambda page: page.stem)
def test_the_commands_of_a_page_print_what_it_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page.read_text(encoding="utf-8")
    before = set(sys.modules)
    prepare(text, tmp_path)
    try:
        for block in read_blocks(text, page.name):
            if block.language != "console":
                continue
            for command in read_commands(block):
                ran = run_command(command.text, tmp_path)
                where = f"{page.name}, line {block.line}: $ {command.text}"
                shown = "\n".join(ran.printed)
                assert ran.exit_code == command.exit_code, f"{where}\n{shown}"
                found = differences(command.shown, ran.printed)
                assert found is None, f"{where}\n{found}\n(python docs/console.py {page.name})"
    finally:
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and str(tmp_path) in file:
                del sys.modules[name]


def test_the_quickstart_has_commands() -> None:
    assert "quickstart" in [page.stem for page in pages_with_commands()]


def console(text: str) -> list[Command]:
    return read_commands(Block("console", {}, text, "page.md", 1))


def test_commands_are_told_from_what_they_print() -> None:
    first, second = console(
        "$ mmgraft graft a \\\n    --dry-run\nline\n\n$ false   # exit code 1\n"
    )
    assert first.text == "mmgraft graft a --dry-run"
    assert first.shown == ["line", ""]
    assert (second.text, second.exit_code) == ("false", 1)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        (["a 1"], ["a 1"], True),
        (["a 1"], ["a 2"], False),
        (["a"], ["a", "b"], False),
        (["a", "..."], ["a", "b", "c"], True),
        (["...", "c"], ["a", "b", "c"], True),
        (["loss 0.5, 10 tokens/s"], ["loss 0.6, 2,000 tokens/s"], True),
        (["loss 0.5, 10 tokens/s"], ["gain 0.5, 10 tokens/s"], False),
        (["sha 1..."], ["sha 123"], True),
        (["sha 1..."], ["sha 23"], False),
    ],
)
def test_shown_and_printed_lines_are_compared(
    shown: list[str], printed: list[str], same: bool
) -> None:
    assert (differences(shown, printed) is None) is same


def test_a_command_that_fails_is_seen(tmp_path: Path) -> None:
    assert run_command("false", tmp_path).exit_code == 1
    ran = run_command("mmgraft graft none --method iaa --layers 1", tmp_path)
    assert ran.exit_code == 2
    assert ran.printed[0].startswith("error: ")
