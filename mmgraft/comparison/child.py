"""A training in a process of its own, so that its time and memory are its own.

The parent records every few seconds what the child has used, because a kill gives no warning. A
child that outlives its parent holds a lock, for which the next session waits.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

import psutil

from mmgraft.comparison.files import Session
from mmgraft.errors import UsageError

POLL_SECONDS, NOTE_SECONDS = 0.2, 10.0
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Ended:
    """End of a child process.

    Attributes:
        code: Its exit code; negative: the signal that killed it.
        session: Its time and memory.
    """

    code: int
    session: Session


def check_platform() -> None:
    """Refuse where processes cannot be measured.

    Raises:
        UsageError: Not on Linux, macOS or another Unix.
    """
    if not hasattr(os, "wait4"):
        raise UsageError(
            "mmgraft compare measures its trainings by what Unix reports of a process; run it on "
            "Linux or macOS, or in WSL"
        )


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[IO[bytes]]:
    """Hold a lock file; a child that inherits the file holds it too, as long as it lives.

    Args:
        path: The file; made where it is missing, and left there.
        waiting: Called before waiting for another holder; None gives up instead.

    Raises:
        UsageError: Another process holds it, and ``waiting`` is None.
    """
    import fcntl  # Unix only

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise UsageError(
                    f"another process is at work in {path.parent}; wait for it, or stop it, or "
                    "give another folder with --out"
                ) from None
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def measured(command: Sequence[str], lock: IO[bytes], note: Callable[[Session], None]) -> Ended:
    """Run a command to its end and measure it; its standard output is discarded.

    Ctrl-C reaches the child as well, which saves and ends; it is waited for.

    Args:
        command: The program and its arguments.
        lock: From :func:`locked`; the child holds it too.
        note: Called every few seconds with what was used so far.

    Raises:
        KeyboardInterrupt: After the child has ended, and ``note`` was called.
    """
    began, since = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    child = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(lock.fileno(),),
        preexec_fn=_end_with(os.getpid()) if sys.platform == "linux" else None,
    )
    peaks: list[float] = []
    interrupted, noted = False, since

    def session(cpu: float) -> Session:
        seconds, peak = time.monotonic() - since, max(peaks, default=None)
        return Session(began=began, seconds=seconds, cpu_seconds=cpu, peak_memory_mb=peak)

    while True:
        try:
            peaks += _peak(child.pid)
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - noted >= NOTE_SECONDS:
                noted = time.monotonic()
                note(session(_cpu(child.pid)))
            time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            interrupted = True  # the child got it too: it finishes its step and saves
    child.returncode = os.waitstatus_to_exitcode(status)
    if not peaks:  # ru_maxrss includes the parent's memory, where that is larger
        peaks = [usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / _MIB]
    ended = Ended(child.returncode, session(usage.ru_utime + usage.ru_stime))
    if interrupted:
        note(ended.session)
        raise KeyboardInterrupt
    return ended


def _end_with(parent: int) -> Callable[[], None]:
    """Ask Linux, in the child, for a Ctrl-C when the parent is gone, upon which it saves."""
    libc = ctypes.CDLL(None)

    def request() -> None:
        libc.prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return request


def _peak(pid: int) -> list[float]:
    """Return the peak resident memory of a process in MiB; nothing where there is no /proc."""
    with suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        lines = [line.split() for line in text.splitlines()]
        return [int(words[1]) / 1024 for words in lines if words[:1] == ["VmHWM:"]]
    return []


def _cpu(pid: int) -> float:
    """Return the processor time of a living process in seconds; 0 of one that has ended."""
    with suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system
    return 0.0
