"""Runs what the pages show, so that they stay true.

What means something here; every other block is only read.

- ``python file=NAME`` (and ``yaml``, ``toml``, ``text`` with ``file=``): written to that file
  before the page's commands run.
- ``console``: lines that begin with ``$ `` are run from top to bottom in one empty folder, called
  ``~/play`` on the page; what stands below a command is what it prints, errors included. A command
  that must fail ends with ``# exit code N``.
- a file ``pyproject.toml`` is installed, as ``pip install -e .`` would do.
- ``<!-- folder: PAGE -->`` on a line of its own: the page begins in the folder in which the
  files of that other page were written and its commands before the first ``mmgraft`` were run.

``bash`` blocks are not run: they install something or need the Hub. ``...`` at the end of a shown
line stands for the rest of the line, alone for any number of lines. In lines that tell a speed all
numbers may differ.

    python docs/console.py PAGE...       run the pages and write what was printed into them
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

DOCS = Path(__file__).resolve().parent
HOME = "~/play"

_FENCE = re.compile(r"^```(\S*)[ \t]*(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FOLDER = re.compile(r"^<!-- folder: (\S+) -->$", re.MULTILINE)
_EXIT = re.compile(r"\s+# exit code (\d+)$")
_SPEED = re.compile(r"tokens/s|\b\d+(\.\d+)? s\b")
_NUMBER = re.compile(r"\d[\d.,:]*")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    options: dict[str, str]
    text: str
    page: str
    line: int


@dataclass
class Command:
    """A command of a ``console`` block and what the page says that it prints."""

    text: str
    exit_code: int = 0
    lines: list[str] = field(default_factory=list)  # as the page has them
    shown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    exit_code: int
    printed: list[str]


def read_blocks(text: str, page: str = "") -> list[Block]:
    """All fenced blocks of a page's text."""
    found = []
    for match in _FENCE.finditer(text):
        words = [word.partition("=") for word in shlex.split(match[2])]
        options = {name: value for name, _, value in words}
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match[1], options, match[3], page, line))
    return found


def read_commands(block: Block) -> list[Command]:
    """Read the commands of a ``console`` block."""
    found: list[Command] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:], lines=[line]))
        elif found and found[-1].text.endswith("\\"):
            found[-1].text = found[-1].text[:-1] + line.strip()
            found[-1].lines.append(line)
        elif found:
            found[-1].shown.append(line)
        else:
            raise ValueError(f"{block.page}, line {block.line}: output before the first command")
    for command in found:
        if code := _EXIT.search(command.text):
            command.text, command.exit_code = _EXIT.sub("", command.text), int(code[1])
    return found


def prepare(text: str, folder: Path, docs: Path = DOCS) -> None:
    """Write the files of a page, and before them what the page that it begins from leaves."""
    for name in _FOLDER.findall(text):
        other = (docs / name).read_text(encoding="utf-8")
        prepare(other, folder, docs)
        shown = [block for block in read_blocks(other, name) if block.language == "console"]
        for command in (command for block in shown for command in read_commands(block)):
            if command.text.startswith("mmgraft "):
                break
            ran = run_command(command.text, folder)
            assert ran.exit_code == command.exit_code, "\n".join(ran.printed)
    for block in read_blocks(text):
        if "file" in block.options:
            path = folder / block.options["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
    if (folder / "pyproject.toml").is_file():
        _install(folder)


def _install(folder: Path) -> None:
    """Leave what `pip install -e .` leaves for importlib.metadata; `run_command` adds the path."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = project["name"], project["version"]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    info.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    lines = []
    for group, points in project.get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    info.joinpath("entry_points.txt").write_text("\n".join(lines) + "\n")


def run_command(text: str, folder: Path) -> Ran:
    """Run one command line in `folder`: mmgraft and python here, all else in a shell."""
    words = shlex.split(text, comments=True)
    stdin = None
    if "<" in words:
        at = words.index("<")
        stdin = folder / words[at + 1]
        words = words[:at] + words[at + 2 :]
    if words[0] in ("mmgraft", "python"):
        printed = io.StringIO()
        with _inside(folder, printed, stdin):
            exit_code = _mmgraft(words[1:]) if words[0] == "mmgraft" else _python(words[1:])
        out = printed.getvalue()
    else:
        shell = subprocess.run(
            text, shell=True, cwd=folder, check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        exit_code, out = shell.returncode, shell.stdout
    out = out.replace(str(folder.resolve()), HOME).replace(str(folder), HOME)
    return Ran(exit_code, [line.rstrip() for line in out.splitlines()])


@contextlib.contextmanager
def _inside(folder: Path, printed: io.StringIO, stdin: Path | None) -> Iterator[None]:
    """As in a process of its own: another folder, no terminal, random numbers from one seed."""
    import torch

    torch.manual_seed(0)
    before, path, source = Path.cwd(), list(sys.path), sys.stdin
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        sys.stdin = stdin.open(encoding="utf-8") if stdin else io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    finally:
        sys.stdin = source
        sys.path[:] = path
        os.chdir(before)


def _mmgraft(words: list[str]) -> int:
    from mmgraft.cli.app import run

    sys.modules.pop("mmgraft.cli.graft", None)  # its options are those of the methods found here
    return run(words)


def _python(words: list[str]) -> int:
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def differences(shown: Sequence[str], printed: Sequence[str]) -> str | None:
    """Say what differs between a page's lines and those that were printed, in words, or None."""
    if _match(list(shown), list(printed)):
        return None
    return "\n".join(["the page shows", *shown, "", "but it printed", *printed])


def _match(shown: list[str], printed: list[str]) -> bool:
    if not shown:
        return not printed
    if shown[0] == "...":
        return any(_match(shown[1:], printed[skip:]) for skip in range(len(printed) + 1))
    return bool(printed) and _same(shown[0], printed[0]) and _match(shown[1:], printed[1:])


def _same(shown: str, printed: str) -> bool:
    if _SPEED.search(shown):
        shown, printed = (_NUMBER.sub("0", line) for line in (shown, printed))
    if shown.endswith("..."):
        return printed.startswith(shown[:-3])
    return shown == printed


def _written(text: str, folder: Path) -> str:
    """Return the page with what its commands print now; lines of `...` are kept as they are."""
    prepare(text, folder)

    def block(match: re.Match[str]) -> str:
        if match[1] != "console":
            return match[0]
        lines: list[str] = []
        for command in read_commands(Block("console", {}, match[3], "", 0)):
            ran = run_command(command.text, folder)
            sys.stderr.write(f"$ {command.text}  ({ran.exit_code})\n")
            same = differences(command.shown, ran.printed) is None
            if ran.exit_code != command.exit_code:
                raise SystemExit("\n".join([f"exit code {ran.exit_code}", *ran.printed]))
            lines += [*command.lines, *(command.shown if same else ran.printed)]
        return f"```console\n{chr(10).join(lines)}\n```"

    return _FENCE.sub(block, text)


def main(pages: Sequence[str]) -> None:
    """Run pages and write into them what was printed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("NO_COLOR", "1")
    for page in map(Path, pages):
        with tempfile.TemporaryDirectory() as folder:
            text = _written(page.read_text(encoding="utf-8"), Path(folder))
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
