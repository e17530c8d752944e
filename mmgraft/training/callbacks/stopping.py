"""End a stage early: at Ctrl-C, and at losses and gradients that are not finite.

After Ctrl-C the step is finished, a checkpoint written, and the way on said. What is not finite is
noticed before the optimizer takes it in.
"""

import errno
import math
import random
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerCallback
from typing_extensions import Self

from mmgraft.errors import MMGraftError
from mmgraft.frozen import Frozen
from mmgraft.model.sharded import is_piece
from mmgraft.training.distributed.parallel import any_rank, of_all_ranks, processes, way_on

#: Rows that a message names; a step may hold thousands.
_NAMED = 16


class NotFinite(MMGraftError):
    """A loss or gradient became nan or inf. No weight has taken it in."""


@dataclass
class FiniteWatch:
    """Keeps the losses of one step with their rows until the step is about to be taken.

    Looking at them once a step, not once a batch, leaves a graphics card one wait a step.

    Attributes:
        stage: Named in errors.
        device: Where processes agree on what they found.
    """

    stage: str
    device: torch.device
    _losses: list[tuple[Sequence[str], Tensor]] = field(default_factory=list)
    _evaluated: list[str] = field(default_factory=list)

    def note(self, rows: Sequence[str], loss: Tensor) -> None:
        """Keep the loss of a batch to train on."""
        self._losses.append((rows, loss.detach()))

    def note_evaluated(self, rows: Sequence[str], loss: Tensor) -> None:
        """Keep the rows of a batch to evaluate on if its loss is not finite."""
        if not torch.isfinite(loss):
            self._evaluated += rows

    def check_step(self, step: int, norm: Tensor | float | None, ranks: int) -> None:
        """Look at all that a step is made of; all ranks do so together and agree.

        Args:
            step: The step about to be taken, counted from 1.
            norm: Of the gradient.
            ranks: How many processes train.

        Raises:
            NotFinite: Names the rows whose loss it is, else all rows of the step.
        """
        seen, self._losses = self._losses, []
        *losses, norm = _read([loss for _, loss in seen], 0.0 if norm is None else norm)
        bad = [
            (names, loss)
            for (names, _), loss in zip(seen, losses, strict=True)
            if not math.isfinite(loss)
        ]
        if not any_rank(bool(bad) or not math.isfinite(norm), self.device, ranks):
            return
        odd = _gathered([loss for _, loss in bad], ranks)
        rows = _gathered([row for names, _ in bad for row in names], ranks)
        if odd:
            raise NotFinite(
                f"the loss of stage {self.stage!r} became {odd[0]} in step {step}, on {named(rows)}"
            )
        rows = _gathered([row for names, _ in seen for row in names], ranks)
        raise NotFinite(
            f"the gradient of stage {self.stage!r} became {norm} in step {step}, though its loss "
            f"is finite, on {named(rows)}"
        )

    def check_evaluation(self, step: int, loss: float, ranks: int) -> None:
        """Look at the loss of an evaluation, which is the same on all ranks.

        Raises:
            NotFinite: Names the rows whose loss it is.
        """
        rows, self._evaluated = self._evaluated, []
        if not math.isfinite(loss):
            raise NotFinite(
                f"the loss on eval_data became {loss} after step {step} of stage {self.stage!r}, "
                f"on {named(_gathered(rows, ranks))}"
            )


def _read(losses: Sequence[Tensor], norm: Tensor | float) -> list[float]:
    """Read losses and the norm, in one wait where they lie together."""
    if not isinstance(norm, Tensor) or not losses or norm.device != losses[0].device:
        return [*(float(loss) for loss in losses), float(norm)]
    return torch.stack([one.detach().float() for one in (*losses, norm)]).tolist()


def named(rows: Sequence[str]) -> str:
    """List rows for a message: all of a few, the first of many and how many more there are."""
    rows = list(dict.fromkeys(rows))
    lines = "".join(f"\n  {row}" for row in rows[:_NAMED])
    more = f"\n  and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"{len(rows)} row{'' if len(rows) == 1 else 's'}:{lines}{more}"


def is_finite(model: nn.Module) -> bool:
    """Tell whether all that is trained is finite; all ranks call this together and agree."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = [p.to_local() if is_piece(p) else p for p in trained]  # type: ignore[attr-defined]
    ranks = processes() if any(map(is_piece, trained)) else 1
    odd = not all(bool(torch.isfinite(parameter).all()) for parameter in own)
    return not any_rank(odd, own[0].device, ranks)


def _gathered(items: list[Any], ranks: int) -> list[Any]:
    return [item for part in of_all_ranks(items, ranks) for item in part]


class RandomState(Frozen):
    """All random numbers to come, as they stood after a step.

    A pass that fails has used some; a checkpoint written after it must not know of them, or the
    run that goes on from it would get others than one that never failed.
    """

    step: int
    python: Any
    numpy: Any
    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls, step: int) -> "RandomState":
        """Take down what stands now, after a step."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(step, random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Put the numbers back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


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
