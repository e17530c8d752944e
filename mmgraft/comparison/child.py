"""A training in a process of its own, so that its time and memory are nobody else's.

The parent notes every few seconds what the child has used, for a kill asks no one. A child that
outlives its parent holds a lock, for which the next sitting waits.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mmgraft.comparison.files import Sitting
from mmgraft.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

POLL_SECONDS, NOTE_SECONDS = 0.2, 10.0
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: Its exit code; negative: the signal that killed it.
        sitting: Its time and memory.
    """

    code: int
    sitting: Sitting


def check_platform() -> None:
    """Refuse where processes cannot be measured.

    Raises:
        UsageError: Not on Linux, macOS or another Unix.
    """
    if not hasattr(os, "wait4"):
        raise UsageError(
            "mmgraft compare measures its trainings by what Unix tells of a process; run it on "
            "Linux or macOS, or in WSL"
        )


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[IO[bytes]]:
    """Hold a lock file; a child that is handed the file holds it too, as long as it lives.

    Args:
        path: The file; made where it is missing, and left there.
        waiting: Called before waiting for whoever holds it; None gives up instead.

    Raises:
        UsageError: Another process holds it, and `waiting` is None.
    """
    import fcntl

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


def measured(command: Sequence[str], lock: IO[bytes], note: Callable[[Sitting], None]) -> Ended:
    """Run a command to its end, its standard output thrown away.

    Ctrl-C reaches the child as well, which saves and ends; it is waited for.

    Args:
        command: The program and its arguments.
        lock: From :func:`locked`; the child holds it too.
        note: Told every few seconds what was used so far.

    Raises:
        KeyboardInterrupt: After the child has ended, and `note` was told.
    """
    began, since = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    child = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(lock.fileno(),),
        preexec_fn=_end_with(os.getpid()) if sys.platform == "linux" else None,
    )
    peak: float | None = None
    interrupted, noted = False, since

    def sitting(cpu: float) -> Sitting:
        return Sitting(
            began=began,
            seconds=time.monotonic() - since,
            cpu_seconds=cpu,
            peak_memory_mb=peak,
        )

    while True:
        try:
            peak = _larger(peak, _peak(child.pid))
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            now = time.monotonic()
            if now - noted >= NOTE_SECONDS:
                noted = now
                note(sitting(_cpu(child.pid)))
            time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            interrupted = True  # the child got it too: it finishes its step and saves
    child.returncode = os.waitstatus_to_exitcode(status)
    if peak is None:  # ru_maxrss counts the parent's memory in, where that is larger
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / _MIB
    ended = Ended(child.returncode, sitting(usage.ru_utime + usage.ru_stime))
    if interrupted:
        note(ended.sitting)
        raise KeyboardInterrupt
    return ended


def _end_with(parent: int) -> Callable[[], None]:
    """Ask Linux, in the child, for a Ctrl-C when the parent is gone, upon which it saves."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _peak(pid: int) -> float | None:
    """Peak resident memory of a process in MiB; None where there is no /proc."""
    with suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        for line in text.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None


def _cpu(pid: int) -> float:
    """Processor time of a living process in seconds; 0 where there is no /proc."""
    with suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        fields = text.rpartition(")")[2].split()  # a name may hold spaces
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _larger(one: float | None, two: float | None) -> float | None:
    known = [value for value in (one, two) if value is not None]
    return max(known, default=None)
