"""metrics.jsonl: one line a log, always written, whatever tracker is in use.

The losses that are logged: between two logs, which a checkpoint keeps, and of an evaluation.
"""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from mmgraft.atomic import atomic_text, free_name
from mmgraft.training.checkpoint import step_of

#: Written into a checkpoint beside what the Trainer writes, which forgets them.
LOSSES = "losses.json"


@dataclass
class LossSum:
    """Losses of one process, summed since the last log.

    Attributes:
        step: The step after which was logged last.
        total: Their sum, in fp32 on the device of the losses; None before the first.
    """

    step: int = 0
    total: Tensor | None = None
    _kept: tuple[int, int, Tensor | None] = field(default=(0, 0, None))

    def add(self, loss: Tensor) -> None:
        """Take in the loss of one forward pass."""
        loss = loss.detach().float()
        self.total = loss.clone() if self.total is None else self.total + loss

    def value(self) -> Tensor:
        """Return the sum, shape ``(1,)``."""
        return torch.zeros(1) if self.total is None else self.total.reshape(1)

    def begin(self, step: int) -> None:
        """Begin anew after a log."""
        self.step, self.total = step, None

    def keep(self, step: int) -> None:
        """Remember what stands after a step."""
        self._kept = step, self.step, self.total

    def restore(self, step: int) -> None:
        """Forget the passes of a step that was not taken; ``step`` is the last that was."""
        after, since, total = self._kept
        if after == step:
            self.step, self.total = since, total

    def write(self, folder: Path, totals: Tensor) -> None:
        """Put it into a checkpoint; ``totals`` are the sums of all processes, ``(ranks,)``."""
        data = {"step": self.step, "sums": totals.tolist()}
        (folder / LOSSES).write_text(json.dumps(data), encoding="utf-8")

    def read(self, folder: Path, rank: int, ranks: int, device: torch.device) -> None:
        """Go on with what a checkpoint holds; one of more or fewer ranks gives each their mean."""
        path = folder / LOSSES
        if not path.is_file():
            return  # of an earlier mmgraft
        data = json.loads(path.read_text(encoding="utf-8"))
        sums = data["sums"]
        mine = sums[rank] if len(sums) == ranks else sum(sums) / len(sums)
        self.step = int(data["step"])
        self.total = torch.tensor(mine, dtype=torch.float32, device=device)
        self.keep(step_of(folder))


def counted(mean: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss of a batch, 0 where nothing is supervised, and its supervised tokens.

    Args:
        mean: Over these tokens; nan may stand for a mean over none.
        labels: ``(b, s)``, -100 where a token is not supervised.
    """
    count = (labels[:, 1:] != -100).sum().to(mean.device)
    return torch.where(count > 0, mean.detach().float(), 0.0), count


@dataclass
class EvalSum:
    """Cross-entropies of an evaluation in one process, summed, and the tokens they are of.

    So its mean is that over all supervised tokens, however the rows stand together in batches.
    """

    total: Tensor | float = 0.0
    tokens: Tensor | int = 0

    def add(self, mean: Tensor, count: Tensor) -> None:
        """Take in a batch by its mean loss and the tokens that it is of; see :func:`counted`."""
        self.total = self.total + mean * count
        self.tokens = self.tokens + count

    def take(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the sum and the count, ``(1,)`` each, and start anew."""
        total, tokens = (torch.as_tensor(one).reshape(1) for one in (self.total, self.tokens))
        self.total = self.tokens = 0
        return total.to(device), tokens.to(device)


FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends step, loss, rates by group, speed, memory and the graft's readings of one stage.

    Args:
        run: The run folder.
        stage: Name of the stage.
    """

    def __init__(self, run: Path, stage: str) -> None:
        self.path = run / FILE
        self.stage = stage
        self.last: dict[str, Any] = {}

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not logs or not state.is_world_process_zero:
            return
        line: dict[str, Any] = {"stage": self.stage, "step": state.global_step}
        if "loss" in logs:
            line["loss"] = logs["loss"]
            line["lr"] = {k[3:]: v for k, v in logs.items() if k.startswith("lr/")}
            others = "grad_norm", "tokens_per_second", "memory_gb", "epoch"
            line |= {key: logs[key] for key in others if key in logs}
            if own := {k[6:]: v for k, v in logs.items() if k.startswith("graft/")}:
                line["graft"] = own
            self.last = line
        elif "eval_loss" in logs:
            line["eval_loss"] = logs["eval_loss"]
        else:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def trim(run: Path, done: Collection[str], stage: str, step: int) -> None:
    """Drop lines of steps that a resumed run will take again: those of a stage after a step.

    Args:
        run: The run folder.
        done: Stages whose lines stay.
        stage: That is gone on with.
        step: Its last one that stays.
    """
    path = run / FILE
    if not path.is_file():
        return
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a line that a kill cut short
        if line["stage"] in done or (line["stage"] == stage and line["step"] <= step):
            lines.append(text + "\n")
    atomic_text(path, "".join(lines))


def put_aside(run: Path) -> None:
    """Keep the metrics of an earlier training under the next free number."""
    path = run / FILE
    if path.is_file():
        path.replace(free_name(path, "-"))


@contextmanager
def tracking_folder(folder: Path) -> Iterator[None]:
    """Put TensorBoard's files into the run unless the user has chosen another folder."""
    name = "TENSORBOARD_LOGGING_DIR"
    chosen = name in os.environ
    os.environ.setdefault(name, str(folder))
    try:
        yield
    finally:
        if not chosen:
            os.environ.pop(name, None)
