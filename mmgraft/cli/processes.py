"""``--processes N``: the same command N times, each process knowing its rank. Free of torch.

torchrun does as much, but shows a traceback of its own for whatever goes wrong and gives the exit
code 1 for all of it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from mmgraft.errors import UsageError

COMMAND = (sys.executable, "-m", "mmgraft")
GRACE = 15.0
"""Seconds that the others have to end by themselves after one has failed."""
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def check_not_launched() -> None:
    """Refuse ``--processes`` inside what torchrun or accelerate has started.

    Raises:
        UsageError: This process is one of several already.
    """
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        raise UsageError(
            f"--processes, but this is process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} "
            "already (torchrun or accelerate launch); give the number of processes to one of them"
        )


def command_line(context: Any, without: str) -> list[str]:
    """What was given to a command, as arguments for it again.

    Args:
        context: Click's, of the command.
        without: Name of a parameter to leave out.
    """
    found: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        if parameter.name == without or value is None or value is False or value == ():
            continue
        if parameter.param_type_name == "argument":
            found.append(str(value))
        elif value is True:
            found.append(parameter.opts[0])
        else:
            for one in value if isinstance(value, tuple | list) else [value]:
                found += [parameter.opts[0], str(one)]
    return found


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run ``mmgraft ARGUMENTS`` in several processes; gives the exit code of the command.

    The first process talks as if it were alone. The others are quiet; if one of them is the first
    to fail, what it said is shown at the end. Ctrl-C and SIGTERM go to all of them, once for each
    time; they stop after their step, saved. When one has failed the others are ended.

    Args:
        count: Processes.
        arguments: Of the command, with its name.
    """
    with tempfile.TemporaryDirectory(prefix="mmgraft-processes-") as folder:
        port = _free_port()
        said = [open(f"{folder}/{rank}", "w+b") for rank in range(1, count)]  # noqa: SIM115
        children: list[subprocess.Popen[bytes]] = []
        try:
            with _passed_on(children):
                for rank in range(count):
                    children.append(_start(rank, count, port, arguments, said))
                first = _wait(children)
            if first is not None and first > 0 and children[0].returncode != 2:
                _show(said[first - 1])
            if first is not None:
                _say_killed(first, children)
            return _exit_code(children, first)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.wait()
            for file in said:
                file.close()


def _start(
    rank: int, count: int, port: int, arguments: Sequence[str], said: Sequence[IO[bytes]]
) -> subprocess.Popen[bytes]:
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL if rank else None,
        stdout=subprocess.DEVNULL if rank else None,
        stderr=said[rank - 1] if rank else None,
        start_new_session=True,  # Ctrl-C comes from here, once
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )


def _end_with_parent() -> None:
    """Let a training whose launcher is killed stop too, saved, instead of going on unseen."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all; gives the first that failed. The others end soon after it, or are ended."""
    first: int | None = None
    due = float("inf")
    asked = False
    while any(child.poll() is None for child in children):
        failed = [rank for rank, child in enumerate(children) if child.poll() not in (None, 0)]
        if failed and first is None:
            first, due = failed[0], time.monotonic() + GRACE
        if time.monotonic() > due:
            for child in children:
                if child.poll() is None:
                    child.kill() if asked else child.terminate()
            asked, due = True, time.monotonic() + GRACE
        time.sleep(0.05)
    failed = [rank for rank, child in enumerate(children) if child.returncode]
    return first if first is not None else next(iter(failed), None)


def _exit_code(children: Sequence[subprocess.Popen[bytes]], first: int | None) -> int:
    if first is None:
        return 0
    code = children[first].returncode
    return code if code > 0 else 128 - code  # ended by a signal, as a shell says it


def _say_killed(first: int, children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Say that a process was ended by a signal that nobody sent through this one."""
    code = -children[first].returncode
    if code <= 0 or code in _SIGNALS:
        return
    sys.stderr.write(
        f"error: process {first + 1} of {len(children)} was ended by {signal.Signals(code).name} "
        "(the system does that where memory runs out); go on with --resume\n"
    )
    sys.stderr.flush()


def _show(file: IO[bytes]) -> None:
    file.seek(0)
    sys.stderr.write(file.read().decode("utf-8", "replace"))
    sys.stderr.flush()


@contextmanager
def _passed_on(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """While the block lasts, signals that stop a training go to the processes that train."""

    def pass_on(number: int, frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
