"""The losses that are logged: between two logs, which a checkpoint keeps, and of an evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mmgraft.training.checkpoint import step_of

FILE = "losses.json"
"""Written into a checkpoint beside what the Trainer writes, which forgets them."""


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
        (folder / FILE).write_text(json.dumps(data), encoding="utf-8")

    def read(self, folder: Path, rank: int, ranks: int, device: torch.device) -> None:
        """Go on with what a checkpoint holds; one of more or fewer ranks gives each their mean."""
        path = folder / FILE
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
