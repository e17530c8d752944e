"""Settings of a recipe that save memory, and what each saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmgraft.recipes.recipe import Recipe, Stage

if TYPE_CHECKING:
    from mmgraft.training.memory.estimate import Estimator, StageEstimate

_WORTH = 0.01  # a saving under this share of the peak is none


@dataclass(frozen=True)
class Switch:
    """One setting.

    Attributes:
        text: What to write.
        costs: What is lost by it, in words.
        change: The recipe with it set; the same recipe where it is set already or cannot be.
    """

    text: str
    costs: str
    change: Callable[[Recipe], Recipe]

    @property
    def name(self) -> str:
        """The key of the recipe."""
        return self.text.partition(":")[0]


@dataclass(frozen=True)
class Saving:
    """Bytes that a switch saves at the recipe's peak when it alone is set."""

    switch: str
    write: str
    costs: str
    saves: int
    peak: int


def _every_stage(change: Callable[[Stage], dict[str, object]]) -> Callable[[Recipe], Recipe]:
    def changed(recipe: Recipe) -> Recipe:
        stages = [stage.model_copy(update=change(stage)) for stage in recipe.stages]
        return recipe.model_copy(update={"stages": stages})

    return changed


def _one_row(stage: Stage) -> dict[str, object]:
    return {"batch_size": 1, "accumulate": stage.accumulate * stage.batch_size}


def _in_8bit(recipe: Recipe) -> Recipe:
    if recipe.parallel != "ddp":
        return recipe  # refused together
    return _every_stage(
        lambda stage: {"optimizer": "adamw_8bit"} if stage.optimizer == "adamw" else {}
    )(recipe)


def _cached(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"feature_cache": recipe.feature_cache or True})


def _in_4bit(recipe: Recipe) -> Recipe:
    if recipe.base == "full":
        return recipe
    return recipe.model_copy(update={"quantization": "nf4"})


def _in_pieces(recipe: Recipe) -> Recipe:
    plain = all(stage.optimizer == "adamw" for stage in recipe.stages) and not recipe.compile
    if recipe.parallel != "ddp" or recipe.quantization is not None or not plain:
        return recipe  # refused together, or on some devices
    return recipe.model_copy(update={"parallel": "fsdp2"})


SWITCHES: tuple[Switch, ...] = (
    Switch("feature_cache: true", "disk space for the features", _cached),
    Switch(
        "gradient_checkpointing: true",
        "a second forward pass of every layer",
        _every_stage(lambda stage: {"gradient_checkpointing": True}),
    ),
    Switch(
        "batch_size: 1, with accumulate times the batch_size of now",
        "speed; the steps stay the same",
        _every_stage(_one_row),
    ),
    Switch("optimizer: adamw_8bit", "rounded moments; needs bitsandbytes", _in_8bit),
    Switch("quantization: nf4", "a base with rounded weights; needs bitsandbytes", _in_4bit),
)
"""In the order in which they are tried: what changes least first."""

SEVERAL = Switch(
    "parallel: fsdp2", "weights that travel between the processes in every step", _in_pieces
)
"""Switch of several processes; it is tried first."""


def switches_for(processes: int) -> tuple[Switch, ...]:
    """Return the switches that so many processes have."""
    return (SEVERAL, *SWITCHES) if processes > 1 else SWITCHES


def peak_of(stages: Sequence[StageEstimate]) -> int:
    """Return the recipe's peak: its largest stage's."""
    return max(stage.peak for stage in stages)


def savings(estimator: Estimator) -> list[Saving]:
    """Find what each switch saves by itself, the largest saving first, without those of nothing."""
    recipe, before = estimator.recipe, peak_of(estimator.stages())
    found: list[Saving] = []
    for switch in switches_for(estimator.processes):
        changed = switch.change(recipe)
        if changed == recipe:
            continue
        peak = peak_of(estimator.stages(changed))
        if before - peak > _WORTH * before:
            found.append(Saving(switch.name, switch.text, switch.costs, before - peak, peak))
    return sorted(found, key=lambda saving: -saving.saves)
