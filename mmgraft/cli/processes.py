"""``--processes N``: the same command N times, started and ended by torch's elastic launcher.

torchrun itself shows a traceback of its own for whatever goes wrong, gives the exit code 1 for all
of it, and kills a training that is still saving; so this is its lower half, ``start_processes``.
"""

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

from mmgraft.errors import UsageError

COMMAND = (sys.executable, "-m", "mmgraft")
#: Seconds that the others have to end by themselves after one has failed.
GRACE = 15.0
_LAUNCHER = "MMGRAFT_LAUNCHER"
_PR_SET_PDEATHSIG = 1


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


def end_with_launcher() -> None:
    """Let a training whose launcher is killed stop too, saved, instead of going on unseen."""
    launcher = os.environ.pop(_LAUNCHER, None)
    if launcher is None or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):
        sys.exit(128 + signal.SIGTERM)


def command_line(context: Any, without: str) -> list[str]:
    """Write what was given to a command as arguments for it again.

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
    """Run ``mmgraft ARGUMENTS`` in several processes and return the exit code of the command.

    The first process talks as if it were alone. The others are quiet; if one of them is the first
    to fail, what it said is shown at the end. Ctrl-C and SIGTERM go to all of them, once for each
    time; they stop after their step, saved. When one has failed the others are ended.

    Args:
        count: Processes.
        arguments: Of the command, with its name.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes
    from torch.distributed.elastic.utils.distributed import get_free_port

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    shared = _environment(count, get_free_port())
    ranks = range(count)
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # by torch: end all
    before = {number: signal.getsignal(number) for number in handled}
    with tempfile.TemporaryDirectory(prefix="mmgraft-processes-") as folder:
        context: Any = start_processes(
            "mmgraft",
            COMMAND[0],
            args={rank: (*COMMAND[1:], *arguments) for rank in ranks},
            envs={rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks},
            logs_specs=DefaultLogsSpecs(
                folder,
                redirects={rank: Std.ERR if rank else Std.NONE for rank in ranks},
                local_ranks_filter={0},
            ),
        )
        children = [context.subprocess_handlers[rank].proc for rank in ranks]
        try:
            _pass_on(children, before)
            first = _first_failed(children)
        finally:
            context.close(timeout=GRACE)
            for number, handler in before.items():
                signal.signal(number, handler)
        if first is None:
            return 0
        if first and children[first].returncode > 0 and children[0].returncode != 2:
            said = Path(context.stderrs[first]).read_text("utf-8", "replace")
            sys.stderr.write(said)
    return _exit_code(children[first].returncode, first, count)


def _environment(count: int, port: int) -> dict[str, str]:
    """Return what all processes find in their environment."""
    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _LAUNCHER: str(os.getpid()),
    }


def _pass_on(children: Sequence[Popen[bytes]], before: Mapping[signal.Signals, Any]) -> None:
    """Send signals that stop a training to the processes that train; the others act as before."""

    def pass_on(number: int, frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for number, handler in before.items():
        stops = number in (signal.SIGINT, signal.SIGTERM)
        signal.signal(number, pass_on if stops else handler)


def _first_failed(children: Sequence[Popen[bytes]]) -> int | None:
    """Wait until all have ended, or for a grace after one has failed; return the first that did."""
    first: int | None = None
    due = float("inf")
    while True:
        alive = [child for child in children if child.poll() is None]
        if first is None:
            first = next((rank for rank, one in enumerate(children) if one.returncode), None)
            due = due if first is None else time.monotonic() + GRACE
        if not alive or time.monotonic() > due:
            return first
        time.sleep(0.05)


def _exit_code(code: int, rank: int, count: int) -> int:
    """Return it as a shell says it; a signal that nobody sent through the launcher is named."""
    if code > 0:
        return code
    if -code not in (signal.SIGINT, signal.SIGTERM):
        sys.stderr.write(
            f"error: process {rank + 1} of {count} was ended by {signal.Signals(-code).name} "
            "(the system does that where memory runs out); go on with --resume\n"
        )
    return 128 - code
