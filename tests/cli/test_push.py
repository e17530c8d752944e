"""`mmgraft push`: asks, refuses, lists, and pushes what a fresh process can fetch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hub_fixtures import contents, make_run
from hub_server import HubServer
from mmgraft.cli.app import run as mmgraft
from mmgraft.model.files.graft_file import BaseReference
from waiting import LAST


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path / "tiny-iaa")


def python(code: str, hub: HubServer, folder: Path, *args: str, xet: bool = True) -> str:
    """Run `code` in a fresh process with an empty HF_HOME, and give what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=hub.env(folder / "fresh_home", xet=xet),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LAST,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_fresh_processes_push_and_fetch(tmp_path: Path, xet: bool) -> None:
    """The whole way as a user goes it: one process pushes, another one has the same bytes."""
    work = tmp_path / "work"
    work.mkdir()
    run = make_run(work / "tiny-iaa", size=256)
    before = contents(run)
    push = "import sys; from mmgraft.cli.app import run; sys.exit(run(sys.argv[1:]))"
    fetch = "from huggingface_hub import snapshot_download as s; print(s('tester/tiny-iaa'))"
    with HubServer() as hub:
        printed = python(push, hub, work, "push", "--yes", xet=xet)
        assert printed == f"{hub.url}/tester/tiny-iaa\n"
        used_xet = any("xorbs" in path for path in hub.paths("POST"))
        assert used_xet == xet
        (tmp_path / "other").mkdir()
        snapshot = Path(python(fetch, hub, tmp_path / "other").strip())
        fetched = contents(snapshot)
    kept = {name: data for name, data in fetched.items() if name != ".gitattributes"}
    after = contents(run)
    assert kept == {name: after[name] for name in kept}
    assert {name: after[name] for name in before} == before
    assert len(kept) == 6


def test_a_dry_run_lists_and_touches_nothing(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert mmgraft(["push", "--dry-run", "--private"]) == 0
    shown = capsys.readouterr()
    assert "would be pushed to <you>/tiny-iaa (private)" in shown.out
    assert "graft.safetensors" in shown.out
    assert re.search(r"graft.safetensors +48.\d KiB", shown.out)
    assert "6 files" in shown.out
    assert "optimizer" not in shown.out
    assert "taking the only graft here, tiny-iaa" in shown.err
    assert hub.requests == []
    assert contents(run) == before


def test_a_dry_run_needs_no_token(
    hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert mmgraft(["push", "tiny-iaa", "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["repo_id"] == "<you>/tiny-iaa"
    assert listed["bytes"] == sum(file["bytes"] for file in listed["files"])
    assert mmgraft(["push", "tiny-iaa", "--yes"]) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert hub.requests == []


def test_without_a_terminal_it_takes_yes(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmgraft(["push", "tiny-iaa"]) == 2
    shown = capsys.readouterr().err
    assert "to the new public tester/tiny-iaa?" in shown
    assert "--yes" in shown
    assert hub.repos == {}


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1), ("\n", 1)])
def test_on_a_terminal_it_asks(
    hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert mmgraft(["push", "tiny-iaa"]) == code
    assert ("tester/tiny-iaa" in hub.repos) == (code == 0)


def test_json_is_all_that_stdout_gets(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["push", "tiny-iaa", "--repo-id", "mine", "--private", "--yes", "--json"]
    assert mmgraft(args) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["url"] == f"{hub.url}/tester/mine"
    assert told["private"] is True
    assert [file["name"] for file in told["files"]] == [
        name for name in hub.repos["tester/mine"].names if name != ".gitattributes"
    ]
    sent = {
        file["name"]: len(hub.repos["tester/mine"].read(file["name"])) for file in told["files"]
    }
    assert {file["name"]: file["bytes"] for file in told["files"]} == sent
    assert hub.repos["tester/mine"].private


def test_a_dead_network_is_exit_1(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail_after(0)
    assert mmgraft(["push", "tiny-iaa", "--yes"]) == 1
    shown = capsys.readouterr().err
    assert "run the same command again" in shown
    assert "Traceback" not in shown


def test_a_local_base_is_exit_2_and_base_id_mends_it(
    hub: HubServer, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "tiny"
    base.mkdir()
    make_run(tmp_path / "local", base=BaseReference(id=str(base)))
    assert mmgraft(["push", "local", "--yes"]) == 2
    assert "--base-id YOU/NAME" in capsys.readouterr().err
    hub.add_model("acme/tiny", base)
    assert mmgraft(["push", "local", "--yes", "--base-id", "acme/tiny"]) == 0
    assert b'"id": "acme/tiny"' in hub.repos["tester/local"].read("graft_config.json")


def test_help_shows_a_command_to_copy(capsys: pytest.CaptureFixture[str]) -> None:
    assert mmgraft(["push", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "mmgraft push qwen2-7b-iaa --private" in shown
    assert "--base-id" in shown
