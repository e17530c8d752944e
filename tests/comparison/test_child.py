"""Children: their time and memory are their own, and no two train one run at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from mmgraft.comparison import child
from mmgraft.comparison.child import check_platform, locked, measured
from mmgraft.comparison.files import Sitting
from mmgraft.errors import UsageError


def run(code: str, lock: Path, noted: list[Sitting] | None = None) -> child.Ended:
    with locked(lock) as file:
        command = [sys.executable, "-c", textwrap.dedent(code)]
        return measured(command, file, (noted if noted is not None else []).append)


def test_time_and_memory_are_the_childs_alone(tmp_path: Path, capfd) -> None:
    here = bytearray(300 << 20)  # what the parent holds is not counted
    here[::4096] = b"x" * len(here[::4096])
    small = run("print('to nobody')", tmp_path / "lock")
    large = run(
        """
        import time
        held = b"x" * (200 << 20)
        until = time.process_time() + 0.4
        while time.process_time() < until: pass
        time.sleep(0.6)
        """,
        tmp_path / "lock",
    )
    del here
    assert (small.code, large.code) == (0, 0)
    assert small.sitting.peak_memory_mb is not None
    assert large.sitting.peak_memory_mb is not None
    if sys.platform == "linux":
        assert small.sitting.peak_memory_mb < 100
    assert 200 < large.sitting.peak_memory_mb < 290
    assert large.sitting.seconds >= 1.0
    assert 0.4 <= large.sitting.cpu_seconds < 5
    assert capfd.readouterr().out == ""


def test_exit_codes_and_signals(tmp_path: Path) -> None:
    assert run("raise SystemExit(3)", tmp_path / "lock").code == 3
    assert run("import os; os.kill(os.getpid(), 9)", tmp_path / "lock").code == -9


def test_what_was_used_so_far_is_noted_while_the_child_lives(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(child, "NOTE_SECONDS", 0.0)
    noted: list[Sitting] = []
    ended = run("import time; time.sleep(1)", tmp_path / "lock", noted)
    assert len(noted) >= 2
    times = [one.seconds for one in noted]
    assert times == sorted(times)
    assert times[-1] <= ended.sitting.seconds
    assert {one.began for one in noted} == {ended.sitting.began}


def test_ctrl_c_waits_for_the_child_that_saves(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    noted: list[Sitting] = []
    code = f"""
        import os, signal, time, pathlib
        def save(*_):
            time.sleep(0.5)
            pathlib.Path({str(saved)!r}).write_text("x")
            raise SystemExit(130)
        signal.signal(signal.SIGINT, save)
        ready = pathlib.Path({str(tmp_path / "ready")!r})
        ready.with_suffix(".new").write_text(str(os.getpid()))
        ready.with_suffix(".new").rename(ready)
        time.sleep(30)
        """

    def press() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        for pid in (os.getpid(), int((tmp_path / "ready").read_text())):  # as a terminal does
            os.kill(pid, signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        run(code, tmp_path / "lock", noted)
    pressing.join()
    assert saved.exists()
    assert noted[-1].seconds >= 0.5


def test_a_lock_that_is_held_is_refused_or_waited_for(tmp_path: Path) -> None:
    busy = pytest.raises(UsageError, match="another process is at work")
    with locked(tmp_path / "lock"), busy, locked(tmp_path / "lock"):
        raise AssertionError("two at a time")
    with locked(tmp_path / "lock"):
        pass  # free again


PARENT = """
import sys
from pathlib import Path
from mmgraft.comparison.child import locked, measured
code = '''
import signal, sys, time
from pathlib import Path
out = Path(sys.argv[1])
def save(*_):
    time.sleep(1.0)
    (out / "saved").write_text("x")
    raise SystemExit(130)
signal.signal(signal.SIGINT, save)
(out / "ready").write_text("x")
time.sleep(30)
'''
out = Path(sys.argv[1])
with locked(out / "lock") as lock:
    measured([sys.executable, "-c", code, str(out)], lock, lambda sitting: None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told by Linux alone")
def test_a_child_whose_parent_is_killed_saves_and_is_waited_for(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)])
    until = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    waited: list[bool] = []
    with locked(tmp_path / "lock", waiting=lambda: waited.append(True)):
        assert waited == [True], "the child still held the lock"
        assert (tmp_path / "saved").exists()


def test_other_platforms_are_refused(monkeypatch) -> None:
    check_platform()
    monkeypatch.delattr(os, "wait4")
    with pytest.raises(UsageError, match="WSL"):
        check_platform()
