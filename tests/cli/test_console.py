from __future__ import annotations

import json

import pytest

from mmgraft.cli import console
from mmgraft.errors import UsageError


@pytest.mark.parametrize(
    ("number", "count", "size"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (1000, "1.0 K", "1000 B"),
        (1024, "1.0 K", "1.0 KiB"),
        (134_515_008, "134.5 M", "128.3 MiB"),
        (5 * 10**15, "5000.0 T", "4547.5 TiB"),
    ],
)
def test_numbers_for_people(number: int, count: str, size: str) -> None:
    assert console.human_count(number) == count
    assert console.human_bytes(number) == size


def test_a_table_prints_brackets_and_wide_text_as_they_are(capsys) -> None:
    wide = "x" * 130
    console.stdout().print(console.table(["a", "b"], [["[red]", 1], [wide, 22]]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("[red] ")
    assert lines[2].rstrip().endswith(f"{wide}  22")
    assert lines[1].rstrip().endswith("   1"), "numbers are aligned right"


def test_json_is_all_that_goes_to_stdout(capsys) -> None:
    console.note("a note with [brackets]")
    console.print_json({"text": "é", "path": __import__("pathlib").Path("x")})
    ran = capsys.readouterr()
    assert json.loads(ran.out) == {"text": "é", "path": "x"}
    assert ran.err == "a note with [brackets]\n"


def test_no_colour_off_a_terminal(capsys) -> None:
    console.show_error("wrong")
    assert capsys.readouterr().err == "error: wrong\n"


def test_a_question_without_a_terminal_needs_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    assert console.confirm("Push?", yes=True)
    with pytest.raises(UsageError, match=r"Push\? There is no terminal to ask on; give --yes"):
        console.confirm("Push?", yes=False)
