"""Printing of commands: results on stdout, everything else on stderr."""

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmgraft.errors import UsageError

_PLAIN_WIDTH = 160  # a pipe has no width; tables must not be folded for it


def refuse_to_overwrite(out: Path, force: bool) -> None:
    """Refuse to write a file that is there already, or whose folder is not there.

    Raises:
        UsageError: One of these.
    """
    if out.exists() and not force:
        raise UsageError(f"{out} is there already; give --force to write over it")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}; make it first")


def stdout() -> Console:
    """Return the console of results, coloured only on a terminal."""
    return _console(stderr=False, terminal=sys.stdout.isatty())


def stderr() -> Console:
    """Return the console of progress, notes and errors, so that stdout can be piped."""
    return _console(stderr=True, terminal=sys.stderr.isatty())


@cache
def _console(stderr: bool, terminal: bool) -> Console:
    width = None if terminal else _PLAIN_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=not terminal)


def print_json(data: Any) -> None:
    """Print data as JSON on stdout, and nothing else."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def note(message: str) -> None:
    """Say something that is not the result, on stderr."""
    stderr().print(escape(message))


def show_error(message: str) -> None:
    """Show why a command stopped; the word before it is red on a terminal."""
    stderr().print(f"[bold red]error:[/] {escape(message)}")


def confirm(question: str, yes: bool) -> bool:
    """Ask a question that spends or overwrites something; ``yes`` answers it.

    Raises:
        UsageError: When there is no terminal to ask on.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError(f"{question} There is no terminal to ask on; give --yes to agree.")
    return typer.confirm(question, err=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> Table:
    """Build a table: numbers aligned right, and no text read as markup."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], int | float) for row in rows) and bool(rows)
        made.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    return made


def human_count(number: int) -> str:
    """Write ``134515008`` as ``134.5 M``."""
    return _scaled(number, 1000, ("", "K", "M", "B", "T"))


def human_bytes(number: int) -> str:
    """Write ``538090176`` as ``513.2 MiB``."""
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(number: int, base: int, units: Sequence[str]) -> str:
    value, power = float(number), 0
    while abs(value) >= base and power < len(units) - 1:
        value /= base
        power += 1
    return f"{number} {units[0]}".strip() if power == 0 else f"{value:.1f} {units[power]}"
