from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import typer

import mmgraft
from mmgraft.cli.app import COMMANDS, run
from mmgraft.errors import MMGraftError, UsageError

ISSUE_COMMANDS = {
    *("graft", "train", "chat", "generate", "serve", "export", "push", "import"),
    *(
        "inspect",
        "recipes",
        "methods",
        "env",
        "demo",
        "data",
        "compare",
        "laws",
        "estimate",
        "eval",
    ),
}


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({}, id="help"),
        pytest.param(
            {"_MMGRAFT_COMPLETE": "complete_bash", "COMP_WORDS": "mmgraft in", "COMP_CWORD": "1"},
            id="completion",
        ),
    ],
)
def test_help_and_completion_import_nothing_heavy(asked: dict[str, str]) -> None:
    code = (
        "import sys\n"
        "from mmgraft.cli.app import run\n"
        "run(['--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'accelerate'}\n"
        "sys.exit(f'imported: {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
    )
    ran = python(code, **asked)
    assert ran.returncode == 0, ran.stderr
    assert "inspect" in ran.stdout


def test_the_overview_names_every_command(cli) -> None:
    ran = cli("--help")
    assert ran.code == 0
    assert set(COMMANDS) == ISSUE_COMMANDS
    for name, command in COMMANDS.items():
        assert f" {name} " in ran.out
        assert command.help.split(",")[0][:40] in ran.out


@pytest.mark.parametrize("name", sorted(ISSUE_COMMANDS))
def test_each_help_shows_a_command_to_copy(cli, name: str) -> None:
    ran = cli(name, "--help")
    assert ran.code == 0, ran.err
    shown = " ".join(ran.out.split())
    assert f"Usage: mmgraft {name}" in shown
    assert f"mmgraft {COMMANDS[name].example}" in shown
    assert COMMANDS[name].example.split()[0] == name
    assert "Args:" not in shown
    assert "Raises:" not in shown


def documented() -> list[list[str]]:
    """Every mmgraft command line of the README, in its `sh` and `bash` blocks."""
    readme = Path(__file__).resolve().parents[2] / "README.md"
    blocks = re.findall(r"```(?:ba)?sh\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("mmgraft ")]


@pytest.mark.parametrize(
    "words",
    [*(["mmgraft", *shlex.split(command.example)] for command in COMMANDS.values()), *documented()],
    ids=" ".join,
)
def test_shown_commands_use_options_that_exist(cli, words: list[str]) -> None:
    name = words[1]
    inner = [words[2]] if name in ("recipes", "data") else []
    help_text = cli(name, *inner, "--help").out
    for flag in (word for word in words if word.startswith("--")):
        assert f" {flag.partition('=')[0]} " in help_text


def test_version(cli) -> None:
    assert cli("--version").out == f"mmgraft {mmgraft.__version__}\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["metods"], "Did you mean 'methods'"),
        (["methods", "--jsn"], "No such option"),
        (["inspect"], "Missing argument"),
        ([], "Usage: mmgraft"),
    ],
)
def test_a_wrong_command_line_exits_2(cli, args: list[str], said: str) -> None:
    ran = cli(*args)
    assert ran.code == 2
    assert said in ran.err + ran.out


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Put a function in the place of `mmgraft env`."""

    def install(function) -> None:
        module = ModuleType("mmgraft.cli.env")
        module.env = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "mmgraft.cli.env", module)

    return install


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("layer 99 [bold] does not exist; choose another"), 2),
        (MMGraftError("the disk is full"), 1),
    ],
)
def test_an_error_is_a_message_on_stderr(cli, command, error: Exception, code: int) -> None:
    def fail() -> None:
        raise error

    command(fail)
    ran = cli("env")
    assert ran.code == code
    assert ran.err == f"error: {error}\n"
    assert ran.out == ""


def test_ctrl_c_exits_130(cli, command) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    command(stop)
    assert cli("env").code == 130


def test_a_defect_keeps_its_traceback(cli, command) -> None:
    def defect() -> None:
        raise ZeroDivisionError

    command(defect)
    with pytest.raises(ZeroDivisionError):
        cli("env")


def test_a_traceback_can_be_asked_for(cli, command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise UsageError("wrong")

    command(fail)
    monkeypatch.setenv("MMGRAFT_TRACEBACK", "1")
    with pytest.raises(UsageError):
        cli("env")


def test_a_command_may_choose_its_exit_code(cli, command) -> None:
    def end() -> None:
        raise typer.Exit(7)

    command(end)
    assert cli("env").code == 7


def test_the_module_and_the_console_script_run_the_same() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "mmgraft", "--version"], check=True, capture_output=True, text=True
    )
    assert ran.stdout == f"mmgraft {mmgraft.__version__}\n"


def test_run_takes_the_process_arguments(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["anything", "--version"])
    assert run() == 0
    assert capsys.readouterr().out.startswith("mmgraft ")


def test_unused_commands_are_never_imported(monkeypatch: pytest.MonkeyPatch, cli) -> None:
    broken = SimpleNamespace(load=lambda name: pytest.fail("imported"), help="x", panel="Look")
    monkeypatch.setitem(COMMANDS, "env", broken)  # type: ignore[arg-type]
    assert cli("--help").code == 0
    assert cli("methods").code == 0
