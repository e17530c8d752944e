"""The memory of every stage of a recipe, and what of it which part takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmgraft.model.modeling import GraftedModel
from mmgraft.recipes.recipe import Recipe
from mmgraft.training.memory.rows import RowSizes
from mmgraft.training.memory.sharing import groups_of, scratch_bytes, share, state_bytes
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
    gradients: int
    optimizer: int
    activations: int
    layers: list[int]
    working: int
    tower: int
    seeing: int
    peak: int
    moment: str


class Estimator:
    """Estimates a recipe and its variations; equal parts of them are simulated once.

    Args:
        subject: What is trained.
        rows: The largest row of each stage.
        device: ``cuda`` or ``cpu``: optimizers hold different things there.
        processes: How many train together, in the way of the recipe's `parallel`.
    """

    def __init__(
        self, subject: Subject, rows: Sequence[RowSizes], device: str = "cuda", processes: int = 1
    ) -> None:
        self.subject, self.rows, self.device = subject, list(rows), device
        self.processes = processes
        self._opened: dict[Any, tuple[GraftedModel, Step]] = {}
        self._towers: dict[Any, tuple[int, int]] = {}
        self._outline: Outline | None = None

    def stages(self, recipe: Recipe, first: int = 0) -> list[StageEstimate]:
        """Estimate every stage of a resolved recipe from ``first`` on.

        Raises:
            MMGraftError: A base that does not run without values.
        """
        return [self._stage(recipe, index) for index in range(first, len(recipe.stages))]

    def _stage(self, recipe: Recipe, index: int) -> StageEstimate:
        stage, rows, in_pieces = recipe.stages[index], self.rows[index], self._in_pieces(recipe)
        model, step = self._open(recipe, index)
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = weights_of(model)
        held = share(
            recipe.parallel,
            self.processes,
            weights=weights,
            trained=sum(p.numel() for p in trained),
            optimizer=state_bytes(model, trained, stage.optimizer, self.device),
            scratch=scratch_bytes(trained, stage.optimizer, self.device),
            groups=groups_of(model),
        )
        images = CACHED_AT_ONCE if recipe.feature_cache else stage.batch_size * rows.images
        tower, seeing = self._tower(recipe, rows, images)
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
            moments["loading"] = sum(weights.values()) + process
        moment = max(moments, key=lambda name: moments[name])
        return StageEstimate(
            stage=stage.name,
            rows=rows,
            batch_size=stage.batch_size,
            parameters=count_of(model),
            trained=sum(p.numel() for p in trained),
            weights=held.weights,
            gathered=held.gathered,
            gradients=held.gradients,
            optimizer=state,
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
        stage, subject, many = recipe.stages[index], self.subject, self.processes > 1
        dtype = loaded_dtype(recipe)
        key = (
            index, tuple(stage.train), stage.batch_size, stage.accumulate > 1,
            stage.gradient_checkpointing, recipe.quantization, stage.precision, dtype,
            recipe.attention,
        )  # fmt: skip
        if key in self._opened:
            return self._opened[key]
        record = subject.record.model_copy(update={"workflow": stage.workflow})
        model = meta_model(
            record, subject.config, subject.width, dtype, recipe.quantization, recipe.attention
        )
        open_stage(model, stage)
        model.train()
        rows = self.rows[index]
        load = Load(
            rows=stage.batch_size,
            length=rows.length,
            plans=self._plans(rows),
            supervised=rows.supervised,
            padded=stage.packing or (rows.uneven and stage.batch_size > 1),
            width=subject.width,
            dtype=dtype,
        )
        step = simulate(
            model,
            load,
            precision=stage.precision or "bf16",
            device=self.device,
            checkpointing=stage.gradient_checkpointing,
            accumulates=stage.accumulate > 1 and not many,
            gradients_leave=many,
        )
        self._opened[key] = model, step
        return model, step

    def _plans(self, rows: RowSizes) -> list[Plan]:
        """Return the plans of the images of the row that has the most."""
        if rows.sizes:
            return [self.subject.plan(size) for size in rows.sizes]
        return [self.subject.plan(None)] * rows.images if rows.images else []

    def _tower(self, recipe: Recipe, rows: RowSizes, images: int) -> tuple[int, int]:
        """Return the bytes of the tower's weights, and what it holds beside them while it runs."""
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
