"""The memory of every stage of a recipe, which part takes what, and the rows that decide it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mmgraft.data.batches.dataset import cut, longest_first
from mmgraft.data.chat.labels import supervise_row
from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.formats.indexed import facts_of, select
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.model.modeling import GraftedModel
from mmgraft.recipes.recipe import Recipe
from mmgraft.training.memory.sharing import Share, groups_of, share, whole_share
from mmgraft.training.memory.simulation import Load, Step, simulate, simulate_tower
from mmgraft.training.memory.stand_in import count_of, meta_model
from mmgraft.training.memory.subject import Subject, loaded_dtype
from mmgraft.training.stages import open_stage
from mmgraft.vision.plan import Size

TOKENISED = 64
"""Rows of a stage that are tokenised: those with the most text and image positions."""


@dataclass(frozen=True)
class RowSizes:
    """The largest row of a stage.

    Attributes:
        length: Positions, images counted.
        images: Images in the row that has the most.
        supervised: Supervised tokens in it.
        uneven: Rows differ in length.
        source: Where the numbers come from, in words.
        sizes: Of the images of that row, where their positions depend on them.
    """

    length: int
    images: int
    supervised: int
    uneven: bool
    source: str
    sizes: tuple[Size, ...] = ()


def measured(
    rows: Sequence[Row],
    processor: GraftProcessor,
    max_length: int | None,
    text_rows: str | None,
    packing: bool = False,
    skip_bad: bool = False,
) -> RowSizes:
    """Measure a stage's rows by tokenising the longest ones; with packing, its sequences.

    Args:
        rows: Of the stage.
        processor: For ids.
        max_length: Where rows are cut.
        text_rows: ``skip`` leaves rows without an image out.
        packing: Several rows stand in one sequence.
        skip_bad: Leave out rows that cannot be used.

    Raises:
        UsageError: A row that cannot be used; with ``skip_bad``, where none of the longest can.
    """
    kept = select(rows, facts_of(rows).with_image) if text_rows == "skip" else rows
    longest = [kept[int(at)] for at in longest_first(kept, processor)[:TOKENISED]]
    encoded = _usable(longest, processor, max_length, skip_bad)
    lengths = [len(one) for one in encoded]
    images = [len(one.images) for one in encoded]
    supervised = [sum(label != -100 for label in one.labels) for one in encoded]
    most = max(encoded, key=lambda one: sum(one.kinds))  # the row with the most image positions
    if packing and max_length is not None:
        # A sequence full of the rows that hold the most images and answers for their length.
        shown, labels = (
            max(max_length * n // length for n, length in zip(counts, lengths, strict=True))
            for counts in (images, supervised)
        )
        sizes, source = most.sizes * (max_length // len(most)), f"packed, from {len(kept)} rows"
        return RowSizes(max_length, shown, labels, True, source, sizes)
    uneven = len(kept) > len(longest) or len(set(lengths)) > 1
    source = f"longest of {len(kept)} rows"
    shown = len(most.sizes) or max(images)
    return RowSizes(max(lengths), shown, max(supervised), uneven, source, most.sizes)


def _usable(
    rows: Sequence[Row], processor: GraftProcessor, max_length: int | None, skip_bad: bool
) -> list[Encoded]:
    """Encode rows as training does, without those that cannot be used where it skips them."""
    found: list[Encoded] = []
    for at, row in enumerate(rows):
        try:
            encoded = supervise_row(processor, row)
            if max_length is not None and len(encoded) > max_length:
                encoded = cut(encoded, max_length, row.where)
            found.append(encoded)
        except UsageError:
            if not skip_bad or (not found and at + 1 == len(rows)):
                raise
    return found


def assumed(length: int, each: int | None, source: str, packing: bool = False) -> RowSizes:
    """Assume rows of one length with one image, all the rest of it supervised.

    A packed sequence is one of many rows: as many images as it has room for, each with an answer.

    Raises:
        UsageError: An image does not fit into the row, or its size decides how much it takes.
    """
    if each is None:
        raise UsageError(
            "with this tower the size of an image decides how many positions it takes; give --data "
            "FILE"
        )
    if length <= each + 1:
        raise UsageError(
            f"a row of {length} positions has no room for an image, which takes {each} with "
            f"this tower, and an answer; give --length {each + 64} or more"
        )
    images = length // (each + 2) if packing else 1
    return RowSizes(length, max(1, images), length - each - 1, True, source)


PROCESS = {"cuda": 0, "cpu": 100_000_000}
"""Bytes that a process takes beside its tensors once it trains: code that is read as it is used."""
ALLOCATOR = {"cuda": 1.0, "cpu": 1.6}
"""Bytes of the machine for each byte that comes and goes in a step.

glibc gives no block back that lies between others that live, and what is kept lies between what
comes and goes. Both numbers are measured, see benchmarks/estimate_memory.py; on CUDA they are in
the reserve of every card.
"""
CACHED_AT_ONCE = 32
"""Images that the tower sees at a time while the feature cache is filled."""


@dataclass(frozen=True, kw_only=True)
class StageEstimate(Share):
    """Bytes that a stage takes, of one process where several share a training.

    Attributes:
        stage: Its name.
        rows: The largest row, and how many are in a batch.
        parameters: Numbers in base, graft and projector.
        trained: Of these, how many the stage trains.
        activations: Kept by the forward pass for the backward one.
        layers: Of these, what each decoder layer keeps, with what the graft adds to it.
        working: What the busiest moment of forward and backward holds beside weights, optimizer
            and, where they add up over several passes, gradients.
        tower: Weights of the vision tower.
        seeing: What the tower holds beside them while it runs.
        peak: The most at any moment, on the device.
        moment: When that is.
    """

    stage: str
    rows: RowSizes
    batch_size: int
    parameters: int
    trained: int
    activations: int
    layers: list[int]
    working: int
    tower: int
    seeing: int
    peak: int
    moment: str


@dataclass
class Estimator:
    """Estimates a recipe and its variations; equal parts of them are simulated once.

    Attributes:
        recipe: Resolved.
        subject: What is trained.
        rows: The largest row of each stage.
        device: ``cuda`` or ``cpu``: optimizers hold different things there.
        processes: How many train together, in the way of the recipe's ``parallel``.
    """

    recipe: Recipe
    subject: Subject
    rows: list[RowSizes]
    device: str = "cuda"
    processes: int = 1
    _opened: dict[Any, tuple[GraftedModel, Step]] = field(default_factory=dict, init=False)
    _towers: dict[Any, tuple[int, int]] = field(default_factory=dict, init=False)

    def stages(self, changed: Recipe | None = None, first: int = 0) -> list[StageEstimate]:
        """Estimate every stage from ``first`` on, of the recipe or of a variation of it.

        Raises:
            MMGraftError: A base that does not run without values.
        """
        recipe = changed or self.recipe
        return [self._stage(recipe, index) for index in range(first, len(recipe.stages))]

    def _stage(self, recipe: Recipe, index: int) -> StageEstimate:
        stage, rows, in_pieces = recipe.stages[index], self.rows[index], self._in_pieces(recipe)
        model, step = self._open(recipe, index)
        whole = whole_share(model, stage.optimizer, self.device)
        held = share(whole, groups_of(model), recipe.parallel, self.processes)
        images = CACHED_AT_ONCE if recipe.feature_cache else stage.batch_size * rows.images
        tower, seeing = self._tower(loaded_dtype(recipe), rows, images)
        process = tower + PROCESS[self.device]
        still = sum(held.weights.values()) + process
        # Several processes keep gradients elsewhere than the pass; those of DDP always lie there.
        many = self.processes > 1
        stay = stage.accumulate > 1 or (many and not in_pieces)
        state, sums = held.optimizer, held.gradients if stay else 0
        working = step.peak - sums + (held.passing + held.gradients if many else 0)
        moving = int(working * ALLOCATOR[self.device])
        moments = {
            "forward and backward": still + held.gathered + state + sums + moving,
            "the optimizer's step": still + state + held.gradients + held.scratch,
            "the vision tower": still + seeing + (0 if recipe.feature_cache else state + sums),
        }
        if recipe.quantization and in_pieces:
            moments["loading"] = sum(whole.weights.values()) + process
        moment = max(moments, key=lambda name: moments[name])
        return StageEstimate(
            **vars(held),
            stage=stage.name,
            rows=rows,
            batch_size=stage.batch_size,
            parameters=count_of(model),
            trained=whole.gradients // 4,
            activations=step.kept - (0 if many else sums),
            layers=step.layers,
            working=working,
            tower=tower,
            seeing=seeing,
            peak=moments[moment],
            moment=moment,
        )

    def _in_pieces(self, recipe: Recipe) -> bool:
        """Tell whether a process keeps its part of the gradients alone."""
        return self.processes > 1 and recipe.parallel != "ddp"

    def _open(self, recipe: Recipe, index: int) -> tuple[GraftedModel, Step]:
        """Open a stage's model and simulate its step; what the optimizer is does not matter."""
        stage, rows, subject = recipe.stages[index], self.rows[index], self.subject
        dtype, many = loaded_dtype(recipe), self.processes > 1
        load = Load(
            rows=stage.batch_size,
            length=rows.length,
            plans=tuple(map(subject.plan, rows.sizes or [None] * rows.images)),
            supervised=rows.supervised,
            padded=stage.packing or (rows.uneven and stage.batch_size > 1),
            width=subject.shape.hidden_size,
            dtype=dtype,
            precision=stage.precision or "bf16",
            device=self.device,
            checkpointing=stage.gradient_checkpointing,
            accumulates=stage.accumulate > 1 and not many,
            gradients_leave=many,
        )
        key = index, load, tuple(stage.train), recipe.quantization, recipe.attention
        if key not in self._opened:
            record = subject.record.model_copy(update={"workflow": stage.workflow})
            loaded = load.width, dtype, recipe.quantization, recipe.attention
            model = meta_model(record, subject.config, *loaded)
            open_stage(model, stage)
            model.train()
            self._opened[key] = model, simulate(model, load)
        return self._opened[key]

    def _tower(self, dtype: torch.dtype, rows: RowSizes, images: int) -> tuple[int, int]:
        """Return the bytes of the tower's weights, and what it holds beside them while it runs."""
        largest = max(rows.sizes, key=lambda size: self.subject.plan(size).entries, default=None)
        key = images, largest, dtype
        if key not in self._towers:
            tower = self.subject.tower
            plans = [self.subject.plan(largest) for _ in range(images)]
            seeing = simulate_tower(tower, largest, plans, dtype) if images else 0
            self._towers[key] = count_of(tower) * dtype.itemsize, seeing
        return self._towers[key]


def not_counted(recipe: Recipe, device: str, processes: int) -> list[str]:
    """Write a sentence for each setting of a recipe that an estimate knows little of.

    Args:
        recipe: Resolved.
        device: ``cuda`` or ``cpu``.
        processes: How many train together.
    """
    found: list[str] = []
    if recipe.compile:
        found.append("compile: counted as without it; torch.compile holds kernels and keeps less")
    if recipe.attention is not None and recipe.attention.startswith("flash"):
        found.append(f"attention: {recipe.attention} is counted as sdpa")
    if device == "cpu" and any(stage.precision != "fp32" for stage in recipe.stages):
        found.append("kernels: code that oneDNN makes for products in bf16, 0.6 GB at most")
    if device == "cpu" and recipe.workers:
        found.append(f"workers: the memory of the {recipe.workers} that load rows")
    if recipe.parallel != "ddp" and processes == 1:
        found.append(f"parallel: {recipe.parallel}: one process shares nothing; give --processes N")
    if processes > 1:
        found.append(
            f"parallel: {recipe.parallel}: its parts are counted by what it does, and were never "
            "compared with a measured peak"
        )
    return found
