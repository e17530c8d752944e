"""The `mmgraft` command: which commands there are, and what happens when one fails.

A command's module is imported when the command runs or is asked for its own help, so that
`mmgraft --help` and shell completion import neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmgraft import __version__
from mmgraft.cli.failures import explain

_MAKE, _USE, _SHARE, _LOOK = "Make", "Use", "Share", "Look"


@dataclass(frozen=True)
class Command:
    """Where a command lives, what the overview says of it, and a line to copy for its own help."""

    module: str
    attribute: str  # a function, or a Typer app for a group of commands
    help: str
    panel: str
    example: str

    def load(self) -> Callable[..., Any] | typer.Typer:
        """The function or app, imported now."""
        return getattr(importlib.import_module(self.module), self.attribute)


COMMANDS: dict[str, Command] = {
    "graft": Command(
        "mmgraft.cli.graft",
        "graft",
        "Put a vision tower on a language model, without loading it.",
        _MAKE,
        "mmgraft graft qwen2-7b --method iaa --layers 22,24",
    ),
    "train": Command(
        "mmgraft.cli.train",
        "train",
        "Train a graft by its recipe, or go on with a run.",
        _MAKE,
        "mmgraft train qwen2-7b-iaa --data rows.jsonl",
    ),
    "recipes": Command(
        "mmgraft.cli.recipes",
        "app",
        "List, show, copy and check training recipes.",
        _MAKE,
        "mmgraft recipes ls",
    ),
    "data": Command(
        "mmgraft.cli.data",
        "app",
        "List and write the data sets and models that packages carry.",
        _MAKE,
        "mmgraft data ls",
    ),
    "compare": Command(
        "mmgraft.cli.compare",
        "compare",
        "Train several grafts alike, measure them alike, and write one report.",
        _MAKE,
        "mmgraft compare easy-vqa --out compare-easy-vqa",
    ),
    "demo": Command(
        "mmgraft.cli.demo",
        "demo",
        "Do the whole job on a small real model, on a CPU.",
        _MAKE,
        "mmgraft demo",
    ),
    "chat": Command(
        "mmgraft.cli.chat",
        "chat",
        "Talk with a grafted model about pictures, or anything.",
        _USE,
        "mmgraft chat qwen2-7b-iaa --image cat.jpg 'What is this?'",
    ),
    "generate": Command(
        "mmgraft.cli.generate",
        "generate",
        "Answer a file of rows in batches: jsonl in, jsonl out.",
        _USE,
        "mmgraft generate qwen2-7b-iaa rows.jsonl --out answers.jsonl",
    ),
    "export": Command(
        "mmgraft.cli.export",
        "export",
        "Write a graft for use elsewhere: stock LLaVA, one full folder.",
        _SHARE,
        "mmgraft export qwen2-7b-iaa --to llava",
    ),
    "push": Command(
        "mmgraft.cli.push",
        "push",
        "Put a graft on the Hub, with its model card.",
        _SHARE,
        "mmgraft push qwen2-7b-iaa --private",
    ),
    "import": Command(
        "mmgraft.cli.import_",
        "import_checkpoint",
        "Turn a published IAA or Wings checkpoint into grafts.",
        _SHARE,
        "mmgraft import AIDC-AI/Wings-Qwen1_5-8B --dry-run",
    ),
    "eval": Command(
        "mmgraft.cli.eval",
        "evaluate",
        "Measure what a graft keeps of text, and what it sees.",
        _LOOK,
        "mmgraft eval qwen2-7b-iaa --text --vision",
    ),
    "estimate": Command(
        "mmgraft.cli.estimate",
        "estimate",
        "Say what memory a training takes, which card is enough, and what saves.",
        _LOOK,
        "mmgraft estimate iaa --base qwen2-7b --set graft.config.layers=22,24",
    ),
    "inspect": Command(
        "mmgraft.cli.inspect",
        "inspect",
        "Show a model's layers and where a graft may go, or what a graft adds.",
        _LOOK,
        "mmgraft inspect smollm2-135m",
    ),
    "laws": Command(
        "mmgraft.cli.laws",
        "laws",
        "Show how much each layer attends to the image and to the text around it.",
        _LOOK,
        "mmgraft laws qwen2-7b-iaa rows.jsonl --images photos",
    ),
    "methods": Command(
        "mmgraft.cli.methods",
        "methods",
        "List the methods of grafting, built in and installed.",
        _LOOK,
        "mmgraft methods",
    ),
    "env": Command(
        "mmgraft.cli.env",
        "env",
        "Show versions, device, caches and what is missing.",
        _LOOK,
        "mmgraft env --json",
    ),
}


class LazyGroup(TyperGroup):
    """A group whose commands are placeholders until one of them is used."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` begin with, its module imported."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            command = _real_command(name, COMMANDS[name])
        return name, command, rest


def _real_command(name: str, command: Command) -> Any:
    target = command.load()
    epilog = f"Example: {command.example}"
    if isinstance(target, typer.Typer):
        target.info.name = name
        target.info.epilog = epilog
        target.info.help = target.info.help or command.help
        target._add_completion = False
        group = typer.main.get_group(target)
        group.name = name
        return group
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command(name, epilog=epilog, help=None if target.__doc__ else command.help)(target)
    return typer.main.get_command(single)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmgraft {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and stop."
        ),
    ] = False,
) -> None:
    """Gives a language model eyes by grafting, and leaves the language model as it was."""


def build_app() -> typer.Typer:
    """The whole command line, its commands still placeholders."""
    app = typer.Typer(
        name="mmgraft",
        cls=LazyGroup,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="Start with: mmgraft demo",
    )
    app.callback()(_root)
    for name, command in COMMANDS.items():
        app.command(name, help=command.help, rich_help_panel=command.panel)(lambda: None)
    return app


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line and give its exit code: 0 done, 1 failed, 2 wrong use, 130 stopped.

    Raises:
        Exception: only what is a defect of mmgraft, so that its traceback can be reported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        typer.main.get_command(build_app()).main(
            args=None if args is None else list(args), prog_name="mmgraft"
        )
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        known = explain(error)
        if known is None or os.environ.get("MMGRAFT_TRACEBACK") == "1":
            raise
        message, code = known
        from mmgraft.cli.console import show_error

        show_error(message)
        return code
    return 0


def main() -> None:
    """The console script."""
    sys.exit(run())
