"""Ctrl-C while a stage trains: the step is finished, a checkpoint written, and the way on said."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback
from typing_extensions import Self

from mmgraft.errors import MMGraftError


class TrainingStopped(MMGraftError):
    """A person stopped the run; it can go on."""

    exit_code = 130


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
        if args.world_size > 1:
            flag = torch.tensor([int(self.requested)], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.requested = bool(flag.item())
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
        return control
