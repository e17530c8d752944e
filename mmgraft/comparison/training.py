"""Train one arm in a child process, as often as it takes, and record what it cost.

The process is the training's own, and so are its time and memory. The parent records every few
seconds what the child has used, because a kill gives no warning. A child that outlives its parent
holds a lock, for which the next session waits.
"""

from __future__ import annotations

import ctypes
import json
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
from typing import IO, Any

import psutil

from mmgraft.comparison.files import PhaseRecord, Session, read_phase, write_phase
from mmgraft.comparison.plan import ArmPlan
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.evaluation.origin import described_record
from mmgraft.evaluation.report.about_run import METRICS, read_metrics
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.progress import say
from mmgraft.runs.results import Results, write_results
from mmgraft.training import checkpoint
from mmgraft.training.callbacks import text_change
from mmgraft.training.run import VERSIONS
from mmgraft.version import __version__

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


LOCK = ".training.lock"


def train_arm(arm: ArmPlan, record: PhaseRecord, device: str) -> PhaseRecord:
    """Start or continue an arm's training, and record it as done.

    Args:
        arm: The arm; its run holds a graft and its recipe.
        record: The record of earlier sessions.
        device: Where it is trained.

    Raises:
        MMGraftError: The training failed; its messages went to standard error.
        KeyboardInterrupt: After it was saved.
    """

    def wait() -> None:
        say(f"{arm.name}: a training of an earlier session still runs; waiting for its end")

    def note(session: Session) -> None:
        write_phase(arm.run, record.after(session))

    with locked(arm.run / LOCK, waiting=wait) as lock:
        command = training_command(arm.run, device)
        if command is None:  # all stages are saved; the process was killed as it ended
            done = record.model_copy(update={"done": True})
        else:
            if "--resume" in command:
                say(f"{arm.name}: going on with a training that was stopped")
            ended = measured(command, lock, note)
            note(ended.session)
            _check(arm, ended)
            done = record.after(ended.session, done=True)
    write_results(arm.run, training_results(arm, done, device))
    write_phase(arm.run, done)
    return done


def training_command(run: Path, device: str) -> Sequence[str] | None:
    """Return the command that starts or continues a run; None where nothing is left to train."""
    command = [sys.executable, "-m", "mmgraft", "train", str(run), "--device", device, "--json"]
    progress = checkpoint.read_progress(run)
    if progress is None:
        return command
    finished, stages = progress["finished"], progress.get("stages", [])
    if stages and len(finished) >= len(stages) and not text_change.is_due(run):
        return None
    saved = finished or any((run / checkpoint.FOLDER).glob("*/checkpoint-*"))
    return [*command, "--resume"] if saved else command


def training_results(arm: ArmPlan, record: PhaseRecord, device: str) -> Results:
    """Return the section ``training``: what it cost and how it ended. See docs/comparing.md."""
    graft = GraftFile.read(arm.run)
    lines = read_metrics(arm.run / METRICS)
    losses = {line.get("stage"): line["loss"] for line in lines if "loss" in line}
    progress = checkpoint.read_progress(arm.run) or {}
    parameters: dict[str, int] = progress.get("trained_parameters", {})
    taken: dict[str, int] = progress.get("steps", {})
    stages: list[dict[str, Any]] = [
        {
            "name": stage.name,
            "trains": list(stage.trains),
            "rows": stage.rows,
            "rows_a_step": stage.rows_a_step,
            "steps": stage.steps or taken.get(stage.name),  # of packed rows it is known now
            "trained_parameters": parameters.get(stage.name),
            "final_loss": losses.get(stage.name),
        }
        for stage in arm.stages
    ]
    on_card = [line["memory_gb"] for line in lines if "memory_gb" in line and device != "cpu"]
    features = read_phase(arm.run, "features")
    return Results(
        section="training",
        mmgraft_version=__version__,
        versions=json.loads((arm.run / VERSIONS).read_text(encoding="utf-8")),
        graft=described_record(graft, arm.run, graft.workflow),
        details={
            "arm": arm.name,
            "recipe": arm.recipe.name,
            "device": device,
            "base_trained": graft.base_trained,
            "seconds": record.seconds,
            "cpu_seconds": record.cpu_seconds,
            "sessions": len(record.sessions),
            "feature_seconds": None if features is None else features.seconds,
            "peak_memory_mb": record.peak_memory_mb,
            "peak_card_memory_mb": max(on_card) * 1e9 / 2**20 if on_card else None,
            "trained_parameters": max(parameters.values(), default=None),
            "steps": {stage["name"]: stage["steps"] for stage in stages},
            "final_losses": {stage["name"]: stage["final_loss"] for stage in stages},
            "stages": stages,
        },
    )


def _check(arm: ArmPlan, ended: Ended) -> None:
    if ended.code == 0:
        return
    if ended.code < 0:
        why = f"was killed by signal {-ended.code} (9 is often too little memory)"
    elif ended.code == 130:
        why = "was stopped, and has saved"
    else:
        why = f"ended with code {ended.code}; its messages are above"
    raise MMGraftError(
        f"the training of arm {arm.name!r} {why}. The same command goes on where it stopped"
    )
