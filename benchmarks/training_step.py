"""A training step against transformers' LlavaForConditionalGeneration under its own Trainer.

    python benchmarks/training_step.py [--case llava] [--case iaa] [--case own] [--pairs 4]

Cases: `llava` trains a projector, `iaa` projector, four inserted layers and the norm, `own` an own
embedding and head too. A row is an image of 576 tokens, given as features, a question of 16 and 64
answer tokens; fp32. Each side runs under its real trainer in a process of its own, one step at a
time in turn. Memory is the peak of one step of `--batch` rows above the loaded model and the
optimizer's state; time is of steps of `--time-batch` rows. The default, LLaVA with both
vocabularies, takes about six minutes on one core and 20 GB; `iaa` and `own` about as long each.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch
from pairs import Pairs, Peak, Row, in_child, options, ratio, show
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from mmgraft import IAAConfig, LlavaConfig
from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.training.stages import open_stage
from mmgraft.training.trainer import GraftTrainer, training_arguments

OURS, THEIRS = "ours", "theirs"


@dataclass(frozen=True)
class Case:
    """Trained parts, vocabulary and goal of a case."""

    name: str
    title: str
    vocab: int
    memory: float | None = None
    """Peak over transformers' at most."""
    time: float = 1.0
    """Times as fast at least."""

    @property
    def config(self) -> Any:
        """The graft's."""
        if self.name == "llava":
            return LlavaConfig()
        own = self.name == "own"
        return IAAConfig(layers=models.PLACES[4], embedding=own, head=own)

    @property
    def train(self) -> list[str]:
        """Groups of the stage."""
        return ["projector"] if self.name == "llava" else ["projector", "graft"]


CASES = (
    Case("llava", "LLaVA projector", models.VOCAB, 0.70, 1.15),
    Case("llava", "LLaVA projector", models.LARGE_VOCAB, 0.40, 1.3),
    Case("iaa", "IAA stage 2", models.VOCAB, 0.70, 1.15),
    Case("iaa", "IAA stage 2", models.LARGE_VOCAB, 0.40, 1.3),
    Case("own", "IAA stage 2, own embedding and head", models.VOCAB),
)


def main() -> int:
    """Measure every case and print."""
    parser = options(__doc__, pairs=4)
    names = sorted({case.name for case in CASES})
    parser.add_argument("--case", action="append", choices=names, help="may be repeated")
    parser.add_argument("--vocab", type=int, action="append", help="only these vocabularies")
    parser.add_argument("--batch", type=int, default=8, help="rows of the step whose peak counts")
    parser.add_argument(
        "--time-batch", type=int, default=1, help="rows of the steps that are timed"
    )
    parser.add_argument("--layers", type=int, default=30, help="of the base")
    parser.add_argument("--only", choices=("memory", "time"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows: list[Row] = []
    for case in CASES:
        if case.name not in (chosen.case or ["llava"]):
            continue
        if chosen.vocab and case.vocab not in chosen.vocab:
            continue
        if chosen.only != "time":
            rows.append(_memory(case, chosen))
        if chosen.only != "memory":
            rows.append(_time(case, chosen))
    return show(chosen, rows)


# -- memory -------------------------------------------------------------------------------------


def _memory(case: Case, chosen: argparse.Namespace) -> Row:
    peaks = {}
    for side in (OURS, THEIRS):
        answer = in_child(_peak_of_a_step, case, side, chosen)
        if "error" in answer:
            raise SystemExit(f"{case.title}, {side}: {answer['error']}")
        peaks[side] = answer["peak"]
    part = peaks[OURS] / peaks[THEIRS]
    return Row(
        f"{case.title}, vocabulary {case.vocab}: peak memory of a step of {chosen.batch} rows",
        "transformers' Llava under its Trainer",
        f"{part:.2f}x ({peaks[OURS] / 1e9:.2f} of {peaks[THEIRS] / 1e9:.2f} GB)",
        "reported" if case.memory is None else f"at most {case.memory:.2f}x",
        part <= (case.memory or 1.0),
        {"ratio": part, "peaks": peaks},
    )


def _peak_of_a_step(case: Case, side: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """A short step makes the optimizer's state, the peak of the next one counts."""
    peak = Peak()

    @contextlib.contextmanager
    def measured(step: int) -> Any:
        if step == 0:
            yield
            return
        with peak:
            yield

    _run(case, side, chosen, chosen.batch, [4, models.IMAGE_TOKENS], measured)
    return {"peak": peak.bytes}


# -- time ---------------------------------------------------------------------------------------


def _time(case: Case, chosen: argparse.Namespace) -> Row:
    pairs = _in_turn(case, chosen)
    faster = ratio([theirs / ours for ours, theirs in zip(pairs.ours, pairs.theirs, strict=True)])
    ours, theirs = pairs.seconds
    return Row(
        f"{case.title}, vocabulary {case.vocab}: time of a step of {chosen.time_batch} rows",
        "transformers' Llava under its Trainer",
        f"{faster}x as fast, {faster.pairs} pairs ({ours:.2f} and {theirs:.2f} s)",
        f"{case.time}x as fast" if case.memory else "never slower",
        _at_least(faster.low, faster.high, case.time),
        {"faster": vars(faster), "seconds": pairs.seconds},
    )


def _at_least(low: float, high: float, limit: float) -> bool | None:
    if low >= limit:
        return True
    return False if high < limit else None


def _in_turn(case: Case, chosen: argparse.Namespace) -> Pairs:
    """Steps of two trainers, each in a process that waits until it is told to take one."""
    sides = {side: _Side(case, side, chosen) for side in (OURS, THEIRS)}
    times: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for number in range(chosen.pairs + 1):
        for side in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
            times[side].append(sides[side].step())
    for one in sides.values():
        one.end()
    return Pairs(times[OURS][1:], times[THEIRS][1:])  # the first step is short


class _Side:
    """A forked process with a trainer in it."""

    def __init__(self, case: Case, side: str, chosen: argparse.Namespace) -> None:
        told, self._tell = os.pipe()
        self._hear, tells = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            code = 1
            try:
                _take_steps(case, side, chosen, told, tells)
                code = 0
            finally:
                os._exit(code)
        os.close(told)
        os.close(tells)
        os.read(self._hear, 1)  # the model is there

    def step(self) -> float:
        """Seconds of the next step."""
        os.write(self._tell, b"s")
        answer = os.read(self._hear, 64)
        if not answer:
            raise SystemExit("a trainer stopped; what it says is above")
        return float(answer)

    def end(self) -> None:
        os.waitpid(self._process, 0)


def _take_steps(case: Case, side: str, chosen: argparse.Namespace, told: int, tells: int) -> None:
    read = time.perf_counter if chosen.clock == "wall" else time.process_time

    @contextlib.contextmanager
    def measured(step: int) -> Any:
        if step == 0:
            os.write(tells, b"r")
        os.read(told, 1)
        start = read()
        yield
        os.write(tells, repr(read() - start).encode())

    images = [4] + [models.IMAGE_TOKENS] * chosen.pairs
    _run(case, side, chosen, chosen.time_batch, images, measured)


# -- the two trainers ---------------------------------------------------------------------------


def _run(
    case: Case,
    side: str,
    chosen: argparse.Namespace,
    batch: int,
    images: list[int],
    measured: Callable[[int], Any],
) -> None:
    """Train: a step for every entry of `images`, its rows with images of so many tokens."""
    base = models.base(case.vocab, num_hidden_layers=chosen.layers)
    config = case.config
    if case.name != "llava":
        config = config.model_copy(update={"layers": models.places(4, chosen.layers)})
    model = models.grafted(base, config)
    recipe = Recipe(
        name="benchmark",
        method="llava" if case.name == "llava" else "iaa",
        precision="fp32",
        log_every=1000,
        save_every=None,
        stages=[
            Stage(
                name="only", train=case.train, lr=1e-5, max_steps=len(images), batch_size=batch,
                schedule="constant",
            )
        ],
    ).resolved(model.default_workflow)  # fmt: skip
    (stage,) = recipe.stages
    groups = open_stage(model, stage)
    rows = _Rows(model, batch, images, side)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(recipe, stage, Path(folder), "cpu", "benchmark")
        steps = _Steps(measured)
        if side == OURS:
            _Ours(model, arguments, stage, groups, rows, _collate, callbacks=[steps]).train()
            return
        trained = _llava(case, model)
        del model, base, groups
        gc.collect()
        _Theirs(
            trained, arguments, data_collator=_collate, train_dataset=rows, callbacks=[steps]
        ).train()


def _llava(case: Case, model: Any) -> Any:
    """Transformers' Llava, with the same parameters trained."""
    made = models.llava(model, copy=True)
    decoder = made.model.language_model
    made.model.multi_modal_projector.requires_grad_(True)
    if case.name != "llava":
        decoder.norm.requires_grad_(True)
        for number, place in enumerate(model.workflow().graft.layer_indices):
            decoder.layers[place + 1 + number].requires_grad_(True)
    if case.name == "own":
        decoder.embed_tokens.requires_grad_(True)
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    wanted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained != wanted:
        raise SystemExit(f"{trained} parameters would be trained against {wanted}")
    return made


class _Ours(GraftTrainer):
    """Rows as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return range(len(train_dataset))


class _Theirs(Trainer):
    """Rows as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return range(len(train_dataset))


class _Rows(Dataset[dict[str, Tensor]]):
    """Rows of all steps, as one of the two models takes them."""

    def __init__(self, model: Any, batch: int, images: list[int], side: str) -> None:
        self.batch, self.side = batch, side
        self.steps = [models.conversation(model, batch, image_tokens=count) for count in images]

    def __len__(self) -> int:
        return self.batch * len(self.steps)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step = self.steps[index // self.batch]
        row = {name: tensor[index % self.batch] for name, tensor in step.items()}
        return row if self.side == OURS else models.for_llava(row)


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class _Steps(TrainerCallback):
    """Enters a context at a step's beginning and leaves it at its end."""

    def __init__(self, measured: Callable[[int], Any]) -> None:
        self.measured = measured
        self.open: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.open = self.measured(state.global_step)
        self.open.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.open.__exit__(None, None, None)


if __name__ == "__main__":
    sys.exit(main())
