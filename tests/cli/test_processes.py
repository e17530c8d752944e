"""`--processes N`: the same command N times. What is started here is a short script instead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from mmgraft.cli import processes
from mmgraft.cli.app import run as mmgraft
from mmgraft.cli.processes import launch
from mmgraft.errors import UsageError
from waiting import LAST, wait_until


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Takes the body of a script, which finds its rank in `rank`."""

    def take(body: str) -> None:
        file = tmp_path / "script.py"
        start = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
        file.write_text(start + body)
        monkeypatch.setattr(processes, "COMMAND", (sys.executable, str(file)))

    monkeypatch.setattr(processes, "GRACE", 1.0)
    return take


def test_each_knows_its_rank_and_all_end_well(script, tmp_path: Path):
    script(
        "import json\n"
        "names = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR',"
        " 'MASTER_PORT', 'OMP_NUM_THREADS']\n"
        f"with open({str(tmp_path)!r} + '/' + str(rank), 'w') as file:\n"
        "    json.dump([sys.argv[1:], {name: os.environ[name] for name in names}], file)\n"
    )
    assert launch(3, ["train", "a run"]) == 0
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [given for given, _ in found] == [["train", "a run"]] * 3
    for name in ("RANK", "LOCAL_RANK"):
        assert [environment[name] for _, environment in found] == ["0", "1", "2"]
    assert {environment["MASTER_PORT"] for _, environment in found} == {found[0][1]["MASTER_PORT"]}
    assert {environment["WORLD_SIZE"] for _, environment in found} == {"3"}


def test_a_mistake_that_all_find_is_said_once(script, capfd, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", LAST)  # each comes to say it itself
    script("time.sleep(0.3 * (rank == 0))\nprint('a mistake', file=sys.stderr)\nsys.exit(2)")
    assert launch(3, []) == 2
    assert capfd.readouterr().err.count("a mistake") == 1


def test_what_one_of_the_others_failed_of_is_said(script, capfd):
    script(
        "print('from', rank)\n"
        "if rank == 1:\n"
        "    print('a bad row', file=sys.stderr)\n"
        "    sys.exit(2)\n"
        f"time.sleep({2 * LAST})"
    )
    assert launch(2, []) == 2  # the first one waits for its like no longer
    said = capfd.readouterr()
    assert said.err == "a bad row\n"
    assert said.out in ("", "from 0\n")  # the second one's output is not shown


def test_who_does_not_listen_is_killed(script, tmp_path: Path):
    deaf = str(tmp_path / "deaf")
    script(
        "if rank == 1:\n"
        f"    while not os.path.exists({deaf!r}):\n"
        "        time.sleep(0.01)\n"
        "    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        f"open({deaf!r}, 'w').close()\n"
        "while True:\n"
        "    time.sleep(1)"
    )
    assert launch(2, []) == 1


def test_a_process_that_is_killed_is_a_failure_and_it_is_said_which(script, capfd):
    script("if rank == 0:\n    os.kill(os.getpid(), signal.SIGKILL)\n" + f"time.sleep({2 * LAST})")
    assert launch(2, []) == 128 + signal.SIGKILL
    said = capfd.readouterr().err
    assert said.startswith("error: process 1 of 2 was ended by SIGKILL")
    assert said.endswith("go on with --resume\n")


def test_ctrl_c_comes_to_all_once(script, tmp_path: Path, monkeypatch):
    listens = threading.Event()
    pass_on = processes._pass_on

    def passed_on(*args: Any) -> None:
        pass_on(*args)
        listens.set()

    monkeypatch.setattr(processes, "_pass_on", passed_on)
    script(
        "count = []\n"
        "signal.signal(signal.SIGINT, lambda *_: count.append(1))\n"
        f"open({str(tmp_path)!r} + f'/ready{{rank}}', 'w').close()\n"
        "while not count:\n"
        "    time.sleep(0.05)\n"
        "time.sleep(0.5)\n"
        "sys.exit(130 if count == [1] else 1)"
    )

    def interrupt() -> None:
        listens.wait()
        wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 2, "the start of both")
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert launch(2, []) == 130
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody ends with the launcher")
@pytest.mark.parametrize(("alive", "code"), [(True, 0), (False, 128 + signal.SIGTERM)])
def test_a_process_whose_launcher_is_gone_ends(alive: bool, code: int):
    begin = "from mmgraft.cli.processes import end_with_launcher as end; end()"
    launcher = os.getpid() if alive else os.getpid() + 1
    environment = {**os.environ, "MMGRAFT_LAUNCHER": str(launcher)}
    assert subprocess.run([sys.executable, "-c", begin], env=environment).returncode == code


@pytest.mark.parametrize("count", ["2", "3"])
def test_the_same_command_is_given_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: str
):
    """All that was given, and nothing else; free of torch until then."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "graft_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    started: list[tuple[int, list[str]]] = []

    def note(processes: int, arguments: list[str]) -> int:
        started.append((processes, arguments))
        return 7

    monkeypatch.setattr(processes, "launch", note)
    given = ["--data", "a.jsonl", "--data", "tune=b.jsonl", "--set", "seed=3", "--max-steps", "4"]
    code = mmgraft(["train", "x", "--processes", count, *given, "--restart", "--json"])
    assert code == 7
    ((processes_, arguments),) = started
    assert processes_ == int(count)
    assert arguments[:2] == ["train", "x"]
    rest = arguments[2:]
    assert sorted(rest) == sorted([*given, "--restart", "--json"])
    assert [rest[at + 1] for at, one in enumerate(rest) if one == "--data"] == [
        "a.jsonl",
        "tune=b.jsonl",
    ]


def test_inside_what_torchrun_started_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="process 1 of 4 already"):
        processes.check_not_launched()
