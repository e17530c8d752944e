"""Ctrl-C while a stage trains: the step is finished, a checkpoint written, and the way on said."""

from __future__ import annotations

import errno
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback
from typing_extensions import Self

from mmgraft.errors import MMGraftError
from mmgraft.training.distributed.parallel import any_rank, way_on

_OF_DISKS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
}  # fmt: skip


class TrainingStopped(MMGraftError):
    """A person stopped the run; it can go on."""

    exit_code = 130


def with_way_on(error: OSError | MMGraftError, run: Path, stage: str) -> MMGraftError | None:
    """Explain what a full disk or the like did to a stage, with the command that goes on.

    It is met wherever a file of the run is written; checkpoints are whole or not there.

    Returns:
        The error to raise instead; None where this one says enough.
    """
    way = f"go on with: {way_on(run)}"
    if isinstance(error, OSError):
        if error.errno not in _OF_DISKS:
            return None
        return MMGraftError(
            f"stage {stage!r} stopped ({error}); what was saved before is whole. Make room, or "
            f"mend what is said, and {way}"
        )
    if type(error) is not MMGraftError or not isinstance(
        error.__cause__, OSError | SafetensorError
    ):
        return None
    return None if "--resume" in str(error) else MMGraftError(f"{error}: {way}")


class Stopper(TrainerCallback):
    """While used as a context, the first Ctrl-C (or SIGTERM) stops after the step, saved.

    A second Ctrl-C stops at once, without saving.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Ask the Trainer to save and stop; all ranks do so after the same step."""
        self.requested = any_rank(self.requested, args.device, args.world_size)
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
        return control
