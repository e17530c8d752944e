"""`mmgraft serve` hands over to vLLM where it can, and says why where it cannot."""

from __future__ import annotations

import os
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tiny_exports import change_record, make_graft


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("words", "boxes"):
        change_record(make_graft(tmp_path, name=name, layers=[1]), workflow=name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The program in place of this process, where vLLM and the plugin are installed."""
    found: list[Any] = []

    def become(path: str, program: list[str], env: dict[str, str]) -> None:
        found.append((program, env))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", become)
    there = {"vllm", "mmgraft_vllm"}
    monkeypatch.setattr(
        "mmgraft.serving.with_vllm.find_spec", lambda name: name in there or find_spec(name)
    )
    return found


def test_every_option_reaches_vllm(runs: Path, became: list[Any], cli) -> None:
    line = ["serve", "words", "boxes", "--host", "127.0.0.2", "--port", "81", "--api-key", "secret"]
    line += ["--cors", "--allow-urls", "--allow-files", str(runs), "--dtype", "bfloat16"]
    ran = cli(*line, "--vllm-options", "--max-model-len 64")
    ((program, env),) = became
    assert program[1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"]
    command = program[3:]
    assert Path(command[1]) == runs / "words-vllm"
    rest = shlex.split(
        "--served-model-name llama words boxes --trust-request-mm-kwargs --middleware "
        "mmgraft_vllm.names.Workflows --host 127.0.0.2 --port 81 --allowed-origins '[\"*\"]' "
        f"--dtype bfloat16 --allowed-local-media-path {runs} --max-model-len 64"
    )
    assert command[2:] == rest
    assert (env["VLLM_API_KEY"], env["MMGRAFT_ALLOWED"]) == ("secret", "http,https,file")
    assert "secret" not in ran.err, "others see a command and its output"
    assert shlex.join(["vllm", *command]) in ran.err
    assert '"dtype": "bfloat16"' in (runs / "words-vllm" / "config.json").read_text()


def test_a_dry_run_says_the_command_alone(runs: Path, became: list[Any], cli) -> None:
    ran = cli("serve", "boxes", "--dry-run")
    assert ran.code == 0
    assert "vllm serve" in ran.err
    assert "--allowed-origins '[]'" in ran.err
    assert not became
    assert not (runs / "boxes-vllm").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--no-vllm"], "--no-vllm"),
        (["--device", "cpu"], "--device"),
        (["--quantization", "nf4"], "--quantization"),
        (["--template-option", "a=1"], "--template-option"),
        (["--show-reasoning"], "--show-reasoning"),
    ],
)
def test_what_is_for_this_process_stays_here(
    runs: Path, became: list[Any], cli, options: list[str], told: str
) -> None:
    ran = cli("serve", "words", "--dry-run", *options)
    assert ran.code == 0
    assert f"not by vLLM: {told}\n" in ran.err
    assert not became


def test_what_vllm_cannot_take_is_said(runs: Path, became: list[Any], cli) -> None:
    make_graft(runs, method="wings", rank=4, name="w")
    ran = cli("serve", "w", "--dry-run")
    assert ran.code == 0
    assert "learners and a router" in ran.err.replace("\n", " ")
    assert not became


def test_without_vllm_it_is_served_here(runs: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmgraft.serving.with_vllm.find_spec", lambda name: None)
    ran = cli("serve", "words", "--dry-run")
    assert "vllm and mmgraft_vllm not installed" in ran.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["words", "nope", "--dry-run"], "nope is neither a folder nor a Hub id"),
        (["nope", "--dry-run"], "nope is neither a folder nor a Hub id"),
        (["words", "--vllm-options", "'open", "--dry-run"], "--vllm-options: No closing quotation"),
        (["words", "--vllm-options", 'a "b'], "--vllm-options: No closing quotation"),
    ],
)
@pytest.mark.parametrize("installed", [True, False])
def test_a_broken_line_is_refused_first(
    line: list[str], says: str, installed: bool, runs: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmgraft.serving.with_vllm.find_spec", lambda name: installed or None)
    ran = cli("serve", *line)
    assert ran.code == 2
    assert says in " ".join(ran.err.split())
    assert not (runs / "words-vllm").exists()
