"""The memory of every stage of a recipe, and what of it which part takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmgraft.model.modeling import GraftedModel
from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.training.memory.kernels import kernel_bytes
from mmgraft.training.memory.optimizer import scratch_bytes, state_bytes
from mmgraft.training.memory.rows import RowSizes
from mmgraft.training.memory.sharing import Groups, Share, groups_of, share
from mmgraft.training.memory.simulation import Load, Step, simulate, simulate_tower
from mmgraft.training.memory.stand_in import Outline, count_of, meta_model, weights_of
from mmgraft.training.memory.subject import Subject, loaded_dtype
from mmgraft.training.stages import open_stage
from mmgraft.vision.plan import Plan

PROCESS = {"cuda": 0, "cpu": 100_000_000}
"""Bytes that a process takes beside its tensors once it trains: code that is read as it is used."""
ALLOCATOR = {"cuda": 1.0, "cpu": 1.6}
"""What a byte that comes and goes in a step takes of the machine.

glibc gives no block back that lies between others that live, and what is kept lies between what
comes and goes. Both numbers are measured, see benchmarks/estimate_memory.py; on CUDA they are in
the reserve of every card.
"""
CACHED_AT_ONCE = 32
"""Images that the tower sees at a time while the feature cache is filled."""


@dataclass(frozen=True)
class StageEstimate:
    """Bytes that a stage takes, of one process where several share a training.

    Attributes:
        stage: Its name.
        rows: The largest row, and how many are in a batch.
        parameters: Numbers in base, graft and projector.
        trained: Of these, how many the stage trains.
        weights: Of base, graft and projector, by dtype; ``nf4`` with its constants.
        gathered: Weights of other processes that are whole here while they are computed with.
        kernels: Of a CPU's products in bf16, one for each shape; see the docs.
        buffers: What several processes hold all the time to exchange gradients.
        gradients: Of what is trained, in fp32.
        optimizer: Its state.
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
    weights: dict[str, int]
    gathered: int
    kernels: int
    buffers: int
    gradients: int
    optimizer: int
    activations: int
    layers: list[int]
    working: int
    tower: int
    seeing: int
    peak: int
    moment: str


@dataclass(frozen=True)
class _Opened:
    """What a stage's model alone decides."""

    parameters: int
    trained: int
    weights: dict[str, int]
    states: dict[str, int]  # by optimizer
    scratch: dict[str, int]
    groups: Groups
    step: Step


class Estimator:
    """Estimates a recipe and its variations; equal parts of them are simulated once.

    Args:
        subject: What is trained.
        rows: The largest row of each stage.
        device: ``cuda`` or ``cpu``: optimizers hold different things there.
        processes: How many train together, in the way of the recipe's `parallel`.
    """

    def __init__(
        self,
        subject: Subject,
        rows: Sequence[RowSizes],
        device: str = "cuda",
        processes: int = 1,
    ) -> None:
        self.subject, self.rows, self.device = subject, list(rows), device
        self.processes = processes
        self._opened: dict[Any, _Opened] = {}
        self._towers: dict[Any, tuple[int, int]] = {}
        self._outline: Outline | None = None

    def stages(self, recipe: Recipe, first: int = 0) -> list[StageEstimate]:
        """Every stage of a resolved recipe from the `first` on.

        Raises:
            MMGraftError: A base that does not run without values.
        """
        return [self._stage(recipe, index) for index in range(first, len(recipe.stages))]

    def _stage(self, recipe: Recipe, index: int) -> StageEstimate:
        stage, rows = recipe.stages[index], self.rows[index]
        made = self._open(recipe, index)
        tower, one_batch = self._tower(recipe, rows, stage.batch_size * rows.images)
        seeing = one_batch
        if recipe.feature_cache:
            seeing = self._tower(recipe, rows, CACHED_AT_ONCE)[1]
        held = self._share(recipe, stage, made)
        still = sum(held.weights.values()) + tower + PROCESS[self.device]
        kernels = self._kernels(stage, rows, made.step)
        still += held.buffers + kernels
        sums = held.gradients if stage.accumulate > 1 else 0
        state = held.optimizer
        if self._in_pieces(recipe):
            working = made.step.peak + held.passing + held.gradients - sums
        else:
            working = made.step.peak - sums
        moving = int(working * ALLOCATOR[self.device])
        moments = {
            "forward and backward": still + held.gathered + state + sums + moving,
            "the optimizer's step": still + state + held.gradients + held.scratch,
            "the vision tower": still + seeing + (0 if recipe.feature_cache else state + sums),
        }
        if recipe.quantization and self._in_pieces(recipe):
            moments["loading"] = sum(made.weights.values()) + tower + PROCESS[self.device]
        moment = max(moments, key=lambda name: moments[name])
        return StageEstimate(
            stage=stage.name,
            rows=rows,
            batch_size=stage.batch_size,
            parameters=made.parameters,
            trained=made.trained,
            weights=held.weights,
            gathered=held.gathered,
            kernels=kernels,
            buffers=held.buffers,
            gradients=held.gradients,
            optimizer=state,
            activations=made.step.kept - (0 if self._in_pieces(recipe) else sums),
            layers=made.step.layers,
            working=working,
            tower=tower,
            seeing=seeing,
            peak=moments[moment],
            moment=moment,
        )

    def _kernels(self, stage: Stage, rows: RowSizes, step: Step) -> int:
        """Bytes of a CPU's kernels; of several rows in a batch the longest decides many shapes."""
        if self.device != "cpu":
            return 0
        lengths = rows.lengths if stage.batch_size == 1 else -(-rows.lengths // 2)
        passes = None if stage.max_steps is None else stage.max_steps * stage.accumulate
        return kernel_bytes(step.kernels, lengths if passes is None else min(lengths, passes))

    def _in_pieces(self, recipe: Recipe) -> bool:
        """Whether a process keeps its part of the gradients alone."""
        return self.processes > 1 and recipe.parallel != "ddp"

    def _share(self, recipe: Recipe, stage: Stage, made: _Opened) -> Share:
        return share(
            recipe.parallel,
            self.processes,
            weights=made.weights,
            parameters=made.parameters,
            trained=made.trained,
            optimizer=made.states[stage.optimizer],
            scratch=made.scratch[stage.optimizer],
            groups=made.groups,
        )

    def _open(self, recipe: Recipe, index: int) -> _Opened:
        stage = recipe.stages[index]
        dtype = loaded_dtype(recipe)
        key = (
            index, tuple(stage.train), stage.batch_size, stage.accumulate > 1,
            stage.gradient_checkpointing, recipe.quantization, stage.precision, dtype,
            recipe.attention, self._in_pieces(recipe),
        )  # fmt: skip
        if key in self._opened:
            return self._opened[key]
        record = self.subject.record.model_copy(update={"workflow": stage.workflow})
        model = meta_model(
            record,
            self.subject.config,
            self.subject.width,
            dtype,
            recipe.quantization,
            recipe.attention,
        )
        open_stage(model, stage)
        model.train()
        self._opened[key] = _Opened(
            **_counted(model, self.device),
            step=self._step(model, stage, index, dtype, self._in_pieces(recipe)),
        )
        return self._opened[key]

    def _step(
        self, model: GraftedModel, stage: Stage, index: int, dtype: Any, in_pieces: bool
    ) -> Step:
        rows = self.rows[index]
        assert stage.workflow is not None
        load = Load(
            rows=stage.batch_size,
            length=rows.length,
            plans=self._plans(rows),
            supervised=rows.supervised,
            padded=stage.packing or (rows.uneven and stage.batch_size > 1),
        )
        return simulate(
            model,
            stage.workflow,
            load,
            width=self.subject.width,
            feature_dtype=dtype,
            precision=stage.precision or "bf16",
            device=self.device,
            checkpointing=stage.gradient_checkpointing,
            accumulates=stage.accumulate > 1 and not in_pieces,
            gradients_leave=in_pieces,
        )

    def _plans(self, rows: RowSizes) -> list[Plan]:
        """Of the images of the row that has the most."""
        if rows.sizes:
            return [self.subject.plan(size) for size in rows.sizes]
        return [self.subject.plan(None)] * rows.images if rows.images else []

    def _tower(self, recipe: Recipe, rows: RowSizes, images: int) -> tuple[int, int]:
        """Bytes of the tower's weights, and of what it holds beside them to see some images."""
        dtype = loaded_dtype(recipe)
        largest = max(rows.sizes, key=lambda size: self.subject.plan(size).entries, default=None)
        key = (images, largest, dtype)
        if key not in self._towers:
            if self._outline is None:
                self._outline = self.subject.outline()
            weights = count_of(self._outline.module) * dtype.itemsize
            seeing = 0
            if images:
                plans = [self.subject.plan(largest)] * images
                seeing = simulate_tower(self._outline, largest, plans, dtype)
            self._towers[key] = weights, seeing
        return self._towers[key]


def _counted(model: GraftedModel, device: str) -> dict[str, Any]:
    trained = [p for p in model.parameters() if p.requires_grad]
    kinds = ("adamw", "adamw_8bit", "paged_adamw_8bit")
    return {
        "parameters": count_of(model),
        "trained": sum(p.numel() for p in trained),
        "weights": weights_of(model),
        "states": {kind: state_bytes(model, trained, kind, device) for kind in kinds},
        "scratch": {kind: scratch_bytes(trained, kind, device) for kind in kinds},
        "groups": groups_of(model),
    }
