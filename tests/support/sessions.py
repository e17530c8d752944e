"""Trainings that are killed: a process of its own forks one for every session, which is fast.

The server imports everything once and never computes a gradient itself, so that what it forks is
like a fresh process: its weights, its random numbers and its files are its own. `play` says where a
session is killed; the kernel does it, and nothing is cleaned up.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from waiting import LAST

WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
"""Audit events that are moments at which a session can be killed, where they touch the run."""


class Kill(NamedTuple):
    """Moment at which a session is killed.

    Attributes:
        stage: From this stage on, counted from 0,
        step: and from this step of it on, counted from 1,
        moments: after so many moments: a forward pass, or something done to a file of the run.
    """

    stage: int
    step: int
    moments: int


class Server:
    """Sessions of trainings, one after another; see :func:`server`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def sit(self, run: Path, kill: Kill | None = None) -> int:
        """Train, or go on with, a run; gives the exit status, -9 where the kill came.

        Raises:
            AssertionError: The session failed by itself.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(run), kill]), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        assert code in (0, -signal.SIGKILL), f"the session ended with {code}; see its traceback"
        return code


@contextmanager
def server() -> Iterator[Server]:
    """A process that sits for trainings; its errors go where the tests' do."""
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}); "
               "import sessions; sessions.serve()"]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Server(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=LAST)


def serve() -> None:
    """Fork a session for every line of the standard input, and say how each ended."""
    for name in ("training.run", "training.session", "training.trainer"):
        importlib.import_module(f"mmgraft.{name}")

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        run, kill = json.loads(line)
        child = os.fork()
        if not child:
            try:
                _play(Path(run), None if kill is None else Kill(*kill))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _play(run: Path, kill: Kill | None) -> None:
    from mmgraft.training import checkpoint
    from mmgraft.training.run import plan_training, train

    plan = plan_training(run, resume=checkpoint.read_progress(run) is not None)
    if kill is not None:
        _die_at(kill, run, plan)
    train(plan)


def _die_at(kill: Kill, run: Path, plan: Any) -> None:
    """Let this process be killed; moments count from the first one that is late enough."""
    from mmgraft.training.trainer import GraftTrainer

    names = [stage.name for stage in plan.stages]
    reached, moments = False, 0

    def moment() -> None:
        nonlocal moments
        moments += reached
        if moments > kill.moments:
            os.kill(os.getpid(), signal.SIGKILL)

    original = GraftTrainer.compute_loss

    def compute_loss(self: GraftTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal reached
        place = names.index(self.stage.name), self.state.global_step + 1
        reached = reached or place >= (kill.stage, kill.step)
        moment()
        return original(self, *args, **kwargs)

    GraftTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    here = str(run)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in WATCHED and isinstance(args[0], str | os.PathLike):
            if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
            path = os.fspath(args[0])
            if path.startswith(here) or (event != "open" and not os.path.isabs(path)):
                moment()  # a folder is removed by names relative to it

    sys.addaudithook(audit)
