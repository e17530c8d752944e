"""The ``mmgraft`` command: a table of commands, and what happens when one fails.

A command's module is imported when the command runs or shows its own help, so that
``mmgraft --help`` and shell completion import neither torch nor transformers.
"""

import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmgraft.cli.console import note, show_error, stderr
from mmgraft.cli.failures import explain
from mmgraft.cli.options import option
from mmgraft.frozen import Frozen
from mmgraft.progress import show_on
from mmgraft.published import PUBLISHED
from mmgraft.version import __version__

_MAKE, _USE, _SHARE, _LOOK = "Make", "Use", "Share", "Look"


class Command(Frozen):
    """One command.

    Attributes:
        panel: Its heading in the overview.
        help: Its line in the overview.
        example: A line to copy, without ``mmgraft``, for its own help.
        attribute: Name of its function in ``mmgraft/cli/NAME.py``, or of the Typer app of a group
            of commands; the command's own name where empty.
    """

    panel: str
    help: str
    example: str
    attribute: str = ""

    def load(self, name: str) -> Callable[..., Any] | typer.Typer:
        """Import the function or app of the command with this name."""
        module = "import_" if name == "import" else name
        return getattr(importlib.import_module(f"mmgraft.cli.{module}"), self.attribute or name)


COMMANDS: dict[str, Command] = {
    "graft": Command(
        _MAKE,
        "Put a vision tower on a language model, without loading it.",
        "graft qwen2-7b --method iaa --layers 22,24",
    ),
    "train": Command(
        _MAKE,
        "Train a graft by its recipe, or go on with a run.",
        "train qwen2-7b-iaa --data rows.jsonl",
    ),
    "recipes": Command(_MAKE, "List, show, copy and check training recipes.", "recipes ls", "app"),
    "data": Command(
        _MAKE, "List and write the data sets and models that packages carry.", "data ls", "app"
    ),
    "compare": Command(
        _MAKE,
        "Train several grafts alike, measure them alike, and write one report.",
        "compare easy-vqa --out compare-easy-vqa",
    ),
    "demo": Command(_MAKE, "Do the whole job on a small real model, on a CPU.", "demo"),
    "chat": Command(
        _USE,
        "Talk with a grafted model about images, or anything.",
        "chat qwen2-7b-iaa --image cat.jpg 'What is this?'",
    ),
    "generate": Command(
        _USE,
        "Answer a file of rows in batches: jsonl in, jsonl out.",
        "generate qwen2-7b-iaa rows.jsonl --out answers.jsonl",
    ),
    "serve": Command(
        _USE, "Serve grafts of one base behind OpenAI's API.", "serve qwen2-7b-iaa --port 8000"
    ),
    "export": Command(
        _SHARE,
        "Write a graft for use elsewhere: stock LLaVA, llama.cpp, one full folder.",
        "export qwen2-7b-iaa --to llava",
    ),
    "push": Command(
        _SHARE, "Put a graft on the Hub, with its model card.", "push qwen2-7b-iaa --private"
    ),
    "import": Command(
        _SHARE,
        f"Turn a published {PUBLISHED} checkpoint into grafts.",
        "import AIDC-AI/Wings-Qwen1_5-8B --dry-run",
        "import_checkpoint",
    ),
    "eval": Command(
        _LOOK,
        "Measure what a graft keeps of text, and what it sees.",
        "eval qwen2-7b-iaa --text --vision",
        "evaluate",
    ),
    "estimate": Command(
        _LOOK,
        "Say what memory a training takes, which card is enough, and what saves.",
        "estimate iaa --base qwen2-7b --set graft.config.layers=22,24",
    ),
    "inspect": Command(
        _LOOK,
        "Show a model's layers and where a graft may go, or what a graft adds.",
        "inspect smollm2-135m",
    ),
    "laws": Command(
        _LOOK,
        "Show how much each layer attends to the image and to the text around it.",
        "laws qwen2-7b-iaa rows.jsonl --images photos",
    ),
    "methods": Command(_LOOK, "List the methods of grafting, built in and installed.", "methods"),
    "env": Command(_LOOK, "Show versions, device, caches and what is missing.", "env --json"),
}


class LazyGroup(TyperGroup):
    """A group whose commands are placeholders until one of them is used."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the module of the command that ``args`` begin with."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            command = _real_command(name, COMMANDS[name])
        return name, command, rest


def _real_command(name: str, command: Command) -> Any:
    target = command.load(name)
    epilog = f"Example: mmgraft {command.example}"
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
        option("--version", "Show the version and stop.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Give a language model eyes by grafting, and leave the language model as it was."""


def build_app() -> typer.Typer:
    """Build the whole command line, its commands still placeholders."""
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


class _Notes(logging.Handler):
    """Show what the library says and warns of where a command's notes stand."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 failed, 2 wrong use, 130 stopped.

    Raises:
        Exception: Only what is a defect of mmgraft, so that its traceback can be reported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # bars of the Hub's client and of transformers
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # It looks for a faster kernel on the Hub, does without, and says so as if it had failed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    log, main = logging.getLogger("mmgraft"), os.environ.get("RANK", "0") == "0"
    show_on(stderr if main else None)
    notes, level = _Notes(), log.level
    log.addHandler(notes)
    log.setLevel(logging.INFO if main else logging.WARNING)
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
        show_error(message)
        return code
    finally:
        show_on(None)
        log.removeHandler(notes)
        log.setLevel(level)
    return 0


def main() -> None:
    """Run the console script."""
    sys.exit(run())
