"""Check the memory that switches save."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.training.memory.shortage import SEVERAL, SWITCHES, peak_of, savings


@dataclass
class Plain:
    """A memory that each switch makes smaller by its own amount, in GB."""

    base: float
    off: dict[str, float]
    recipe: Recipe
    processes: int = 1

    def stages(self, changed: Recipe | None = None) -> list[Any]:
        recipe = changed or self.recipe
        stage = recipe.stages[0]
        on = {
            "gradient_checkpointing": stage.gradient_checkpointing,
            "batch_size": stage.batch_size == 1,
            "optimizer": stage.optimizer == "adamw_8bit",
            "quantization": recipe.quantization == "nf4",
            "feature_cache": bool(recipe.feature_cache),
            "parallel": recipe.parallel == "fsdp2",
        }
        saved = sum(size for name, size in self.off.items() if on[name])
        return [SimpleNamespace(peak=int((self.base - saved) * 1e9))]


def recipe(**changes: Any) -> Recipe:
    stage = {"name": "s", "train": ["projector"], "lr": 1.0, "batch_size": 4, "accumulate": 2}
    return Recipe.model_validate(
        {"name": "r", "method": "llava", "stages": [stage], **changes}
    ).resolved()


def estimator(base: float, **off: float) -> Any:
    return cast(Any, Plain(base, off, recipe()))


def test_each_saving_is_that_of_its_switch_alone_and_the_largest_comes_first():
    found = savings(estimator(20, gradient_checkpointing=8, quantization=9, optimizer=0.1))
    assert [(one.switch, one.saves, one.peak) for one in found] == [
        ("quantization", int(9e9), int(11e9)),
        ("gradient_checkpointing", int(8e9), int(12e9)),
    ]  # the 8-bit optimizer saves less than a hundredth, the others nothing


def test_a_switch_that_is_set_or_cannot_be_is_not_named():
    quiet = recipe(quantization="nf4", feature_cache=True)
    names = {switch.name for switch in SWITCHES if switch.change(quiet) != quiet}
    assert names == {"gradient_checkpointing", "batch_size", "optimizer"}
    stage = {"name": "s", "train": ["base"], "lr": 1.0}
    full = recipe(base="full", stages=[stage])
    assert "quantization" not in {s.name for s in SWITCHES if s.change(full) != full}


def test_one_row_at_a_time_keeps_the_step():
    switch = next(one for one in SWITCHES if one.name == "batch_size")
    (stage,) = switch.change(recipe()).stages
    assert (stage.batch_size, stage.accumulate) == (1, 8)


def test_the_peak_is_that_of_the_largest_stage():
    stages = [SimpleNamespace(peak=peak) for peak in (3, 7, 5)]
    assert peak_of(cast(Any, stages)) == 7
    assert isinstance(recipe().stages[0], Stage)


def test_several_processes_may_share_the_model_and_what_is_refused_then_is_not_named():
    several = Plain(20, {"parallel": 12, "optimizer": 9}, recipe(), processes=4)
    assert [one.write for one in savings(cast(Any, several))] == [
        "parallel: fsdp2",
        "optimizer: adamw_8bit",
    ]
    assert [one.write for one in savings(estimator(20, parallel=12))] == []
    pieces = recipe(parallel="fsdp2")
    eight = next(one for one in SWITCHES if one.name == "optimizer")
    assert eight.change(pieces) == pieces
    assert SEVERAL.change(recipe(quantization="nf4")) == recipe(quantization="nf4")
