"""Writes docs/cli.md from the commands themselves; a test compares.

python docs/make_cli.py
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from mmgraft.cli.app import COMMANDS

PAGE = Path(__file__).with_name("cli.md")

HEAD = """\
# Commands

Written by `python docs/make_cli.py` from the commands themselves; not to be edited by hand.
`mmgraft COMMAND --help` says the same.

Every command exits with 0 when it is done, 1 when a correct command failed (a full disk, a dead
network), 2 for wrong use, and 130 after Ctrl-C. Results go to stdout, everything else to stderr.
`--json` prints the result as JSON; `--dry-run` says what would be done and writes nothing.
"""

_TYPES = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}


def page() -> str:
    """Return the whole page."""
    rows = [
        f"| [`{name}`](#mmgraft-{name}) | {_cell(command.help)} |"
        for name, command in COMMANDS.items()
    ]
    parts = [HEAD, "\n".join(["| command | what it does |", "|---|---|", *rows])]
    for name, command in COMMANDS.items():
        target = command.load(name)
        if isinstance(target, typer.Typer):
            parts += [f"## mmgraft {name}", command.help]
            for inner in target.registered_commands:
                assert inner.callback is not None
                parts += _describe(f"{name} {inner.name}", inner.callback, inner.epilog or "", 3)
        else:
            parts += _describe(name, target, f"Example: {command.example}", 2)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _describe(name: str, function: Callable[..., Any], example: str, level: int) -> Iterator[str]:
    yield f"{'#' * level} mmgraft {name}"
    yield _text(inspect.getdoc(function) or COMMANDS[name].help)
    usage, arguments, options = [f"mmgraft {name}"], [], []
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        if hints[parameter.name] is typer.Context:
            continue  # typer gives it; a user does not
        kind, info = _parts(hints[parameter.name])
        required = parameter.default is inspect.Parameter.empty
        if isinstance(info, ArgumentInfo):
            word = parameter.name.upper()
            usage.append(word if required else f"[{word}]")
            arguments.append(f"| `{word}` | {_cell(info.help)} |")
        else:
            shown = "required" if required else _default(parameter.default)
            names = _names(parameter.name, kind, info)
            options.append(f"| {names} | {shown} | {_cell(info.help)} |")
    yield "\n".join(["```text", " ".join([*usage, "[OPTIONS]"] if options else usage), "```"])
    if arguments:
        yield "\n".join(["| argument | |", "|---|---|", *arguments])
    if options:
        yield "\n".join(["| option | default | |", "|---|---|---|", *options])
    yield f"Example: `{example.removeprefix('Example: ')}`"


def _parts(hint: Any) -> tuple[Any, ArgumentInfo | OptionInfo]:
    """Return the plain type and typer's description of a parameter."""
    assert get_origin(hint) is Annotated, hint
    kind, *infos = get_args(hint)
    info = next(one for one in infos if isinstance(one, ArgumentInfo | OptionInfo))
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (one for one in get_args(kind) if one is not type(None))
    return kind, info


def _names(name: str, kind: Any, info: Any) -> str:
    # typer.Option("--yes", "-y") keeps the first name as its default until a command is built.
    given = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
    names = given or [f"--{name.replace('_', '-')}"]
    shown = ", ".join(f"`{one}`" for one in names)
    if kind is bool:
        return shown.replace("/", "` / `")
    if get_origin(kind) is list:
        return f"{shown} {_TYPES[get_args(kind)[0]]}, may be repeated"
    if get_origin(kind) is Literal:
        return f"{shown} {', '.join(get_args(kind))}"
    return f"{shown} {_TYPES[kind]}"


def _default(value: Any) -> str:
    return "" if value in (None, "") or isinstance(value, bool) else f"`{value}`"


def _cell(text: str | None) -> str:
    return _text(text or "").replace("|", "\\|")


def _text(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
