"""Children: their time and memory are their own, and no two train one run at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmgraft.comparison import runner as child
from mmgraft.comparison.files import Session
from mmgraft.comparison.runner import check_platform, locked, measured
from mmgraft.errors import UsageError
from waiting import wait_until


def run(
    code: str, lock: Path, note: Callable[[Session], None] = lambda session: None
) -> child.Ended:
    with locked(lock) as file:
        return measured([sys.executable, "-c", textwrap.dedent(code)], file, note)


def polled(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Have `act` called wherever `measured` would sleep between two looks at its child."""

    def nap(seconds: float) -> None:
        act()
        time.sleep(0.01)

    monkeypatch.setattr(child, "time", SimpleNamespace(monotonic=time.monotonic, sleep=nap))


WAITS = """
import time
from pathlib import Path
Path(out, "ready").touch()
while not Path(out, "end").exists(): time.sleep(0.01)
"""

LARGE = f"""
import time
began = time.monotonic()
held = b"x" * (200 << 20)
until = time.process_time() + 0.4
while time.process_time() < until: pass
{WAITS}
Path(out, "used").write_text(f"{{time.monotonic() - began}} {{time.process_time()}}")
"""


def test_time_and_memory_are_the_childs_alone(tmp_path: Path, capfd, monkeypatch) -> None:
    """Each child ends when it was looked at twice since it has what is measured."""
    here = bytearray(300 << 20)  # what the parent holds is not counted
    here[::4096] = b"x" * len(here[::4096])
    ready, end, used = tmp_path / "ready", tmp_path / "end", tmp_path / "used"
    looks: list[int] = []

    def look() -> None:
        if ready.exists():
            looks.append(1)
        if len(looks) == 2:
            end.touch()

    polled(monkeypatch, look)
    small = run(f"out = {str(tmp_path)!r}\nprint('to nobody'){WAITS}", tmp_path / "lock")
    for file in (ready, end):
        file.unlink()
    looks.clear()
    large = run(f"out = {str(tmp_path)!r}{LARGE}", tmp_path / "lock")
    del here
    seconds, cpu = map(float, used.read_text().split())
    assert (small.code, large.code) == (0, 0)
    assert small.session.peak_memory_mb is not None
    assert large.session.peak_memory_mb is not None
    if sys.platform == "linux":
        assert small.session.peak_memory_mb < 100
    assert 200 < large.session.peak_memory_mb < 290
    assert large.session.seconds >= seconds
    assert large.session.cpu_seconds >= cpu - 0.02  # counted in ticks
    assert small.session.cpu_seconds < large.session.cpu_seconds
    assert capfd.readouterr().out == ""


def test_exit_codes_and_signals(tmp_path: Path) -> None:
    assert run("raise SystemExit(3)", tmp_path / "lock").code == 3
    assert run("import os; os.kill(os.getpid(), 9)", tmp_path / "lock").code == -9


def test_what_was_used_so_far_is_noted_while_the_child_lives(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(child, "NOTE_SECONDS", 0.0)
    noted: list[Session] = []

    def note(session: Session) -> None:
        noted.append(session)
        if len(noted) == 3:
            (tmp_path / "end").touch()

    code = f"""
        import pathlib, time
        while not pathlib.Path({str(tmp_path / "end")!r}).exists(): time.sleep(0.01)
        """
    ended = run(code, tmp_path / "lock", note)
    assert len(noted) >= 3
    times = [one.seconds for one in noted]
    assert times == sorted(times)
    assert times[-1] <= ended.session.seconds
    assert {one.began for one in noted} == {ended.session.began}


SAVING = """
import signal, sys, time
from pathlib import Path
out = Path(sys.argv[1])
def save(*_):
    (out / "saving").touch()
    while not (out / "end").exists(): time.sleep(0.01)
    (out / "saved").touch()
    raise SystemExit(130)
signal.signal(signal.SIGINT, save)
(out / "ready").touch()
signal.pause()
"""
"""A child that saves after Ctrl-C, and ends its save when it is told to."""


def test_ctrl_c_waits_for_the_child_that_saves(tmp_path: Path, monkeypatch) -> None:
    """Ctrl-C comes where `measured` sleeps, to it and to its child, as from a terminal."""
    monkeypatch.setattr(child, "NOTE_SECONDS", float("inf"))  # however slow the machine is
    noted: list[Session] = []
    children: list[subprocess.Popen] = []
    start = subprocess.Popen

    def popen(*arguments: Any, **settings: Any) -> subprocess.Popen:
        children.append(start(*arguments, **settings))
        return children[-1]

    monkeypatch.setattr(child.subprocess, "Popen", popen)
    pressed: list[bool] = []
    waiting: list[bool] = []

    def press() -> None:
        if (tmp_path / "ready").exists() and not pressed:
            pressed.append(True)
            children[0].send_signal(signal.SIGINT)
            raise KeyboardInterrupt
        if (tmp_path / "saving").exists() and not waiting:
            waiting.append(not noted)  # it would be noted if the child were no longer waited for
            (tmp_path / "end").touch()

    polled(monkeypatch, press)
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "lock") as lock:
        measured([sys.executable, "-c", SAVING, str(tmp_path)], lock, noted.append)
    assert waiting == [True]
    assert (tmp_path / "saved").exists()
    assert len(noted) == 1


def test_a_lock_that_is_held_is_refused_or_waited_for(tmp_path: Path) -> None:
    busy = pytest.raises(UsageError, match="another process is at work")
    with locked(tmp_path / "lock"), busy, locked(tmp_path / "lock"):
        raise AssertionError("two at a time")
    with locked(tmp_path / "lock"):
        pass  # free again


PARENT = """
import sys
from pathlib import Path
from mmgraft.comparison.runner import locked, measured
out = Path(sys.argv[1])
with locked(out / "lock") as lock:
    measured([sys.executable, "-c", sys.argv[2], str(out)], lock, lambda session: None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports a parent's death")
def test_a_child_whose_parent_is_killed_saves_and_is_waited_for(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), SAVING])
    wait_until((tmp_path / "ready").exists, "the child's start")
    parent.kill()
    parent.wait()
    with locked(tmp_path / "lock", waiting=(tmp_path / "end").touch):
        assert (tmp_path / "end").exists(), "the child still held the lock"
        assert (tmp_path / "saved").exists()


def test_other_platforms_are_refused(monkeypatch) -> None:
    check_platform()
    monkeypatch.delattr(os, "wait4")
    with pytest.raises(UsageError, match="WSL"):
        check_platform()
