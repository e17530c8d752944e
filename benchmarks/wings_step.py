"""A training step of Wings against explicit attention maps and logits of all positions.

    python benchmarks/wings_step.py [--rows 2] [--length 1024] [--pairs 2] [--json]

Base frozen; projector, learners and router trained by AdamW in fp32. The explicit side computes the
same step as the published code does: every attention map written out, of the base and of the
learners, and logits of all positions. Memory is the peak of a whole process that does nothing else,
weights and imports in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from explicit_wings import explicit_loss, row_of, shape_options, trained_gradients, wings
from pairs import Peak, Row, alternate, clock, in_child, options, show
from torch import Tensor

from mmgraft.model.modeling import GraftedModel

TIME, MEMORY = 0.65, {"ours": 0.45, "ours, checkpointed": 0.25}


class Steps:
    """A model in training and the steps of both sides."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.model: GraftedModel = wings(given)
        self.model.set_trainable(["projector", "graft"])
        self.model.train()
        self.batch = row_of(self.model, given.length, given.rows, given.answer)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6)
        self.losses: dict[str, float] = {}

    def ours(self) -> None:
        """As `mmgraft train` runs it."""
        self._step("ours", lambda: self.model(**self.batch, workflow="mm").loss)

    def theirs(self) -> None:
        """Explicitly."""
        self._step("theirs", lambda: explicit_loss(self.model, self.batch))

    def checkpointed(self) -> None:
        """Ours, with gradient checkpointing."""
        self.model.gradient_checkpointing_enable()
        self.ours()
        self.model.gradient_checkpointing_disable()

    def _step(self, name: str, loss_of: Callable[[], Tensor]) -> None:
        loss = loss_of()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses[name] = loss.item()

    def check(self) -> None:
        """Both sides have the same loss and gradients."""
        found = []
        for loss_of in (
            lambda: self.model(**self.batch, workflow="mm").loss,
            lambda: explicit_loss(self.model, self.batch),
        ):
            loss = loss_of()
            loss.backward()
            found.append({"loss": loss.detach(), **trained_gradients(self.model)})
            self.optimizer.zero_grad(set_to_none=True)
        ours, theirs = found
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            limit = 1e-3 * float(tensor.abs().max())
            torch.testing.assert_close(ours[name], tensor, atol=limit, rtol=1e-3, msg=name)


def main() -> int:
    """Measure; a row for time and one for memory."""
    parser = shape_options(options(__doc__, pairs=2))
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--answer", type=int, default=64, help="supervised positions of a row")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    Steps(argparse.Namespace(layers=2, vocab=200, length=608, rows=1, answer=16)).check()
    kinds = {"theirs": "theirs", "ours": "ours", "ours, checkpointed": "checkpointed"}
    peaks = {name: in_child(_peak, given, kind) for name, kind in kinds.items()}
    steps = Steps(given)
    timed = alternate(steps.ours, steps.theirs, pairs=given.pairs, warm=0, clock=clock(given))
    ours, theirs = timed.seconds
    what = f"Wings training step, graft trained, batch {given.rows}, s = {given.length}"
    against = "explicit attention maps and full-sequence logits"
    time_row = Row(
        f"{what}: time",
        against,
        f"{timed.ratio}x ({ours:.1f} of {theirs:.1f} s)",
        f"at most {TIME}x",
        timed.ratio.below(TIME),
        {"seconds": [timed.ours, timed.theirs], "losses": steps.losses},
    )
    return show(given, [time_row, *(_memory_row(what, against, peaks, name) for name in MEMORY)])


def _memory_row(what: str, against: str, peaks: dict[str, Any], name: str) -> Row:
    ours, theirs = peaks[name], peaks["theirs"]
    ratio, above = (ours[key] / theirs[key] for key in ("total", "peak"))
    with_it = ", gradient checkpointing" if "checkpointed" in name else ""
    return Row(
        f"{what}{with_it}: peak memory",
        against,
        f"{ratio:.3f}x ({ours['total'] / 1e9:.2f} of {theirs['total'] / 1e9:.2f} GB; "
        f"{above:.3f}x above the loaded model)",
        f"at most {MEMORY[name]}x",
        ratio <= MEMORY[name],
        {"ours": ours, "theirs": theirs},
    )


def _peak(given: argparse.Namespace, kind: str) -> dict[str, Any]:
    steps = Steps(given)
    with Peak() as peak:
        getattr(steps, kind)()
    return {"peak": peak.bytes, "total": peak.bytes + peak.before}


if __name__ == "__main__":
    raise SystemExit(main())
