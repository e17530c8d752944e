"""Too little memory: a warning before a training begins, the error that ends one, what saves.

Common cards stand in ``cards.yaml``, with what of their memory a training can have.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
import yaml

from mmgraft.errors import MMGraftError
from mmgraft.frozen import Frozen
from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.training.distributed.parallel import processes, processes_here

if TYPE_CHECKING:
    from mmgraft.training.memory.estimate import Estimator, StageEstimate
    from mmgraft.training.plan import Plan


class Card(Frozen):
    """A size of card.

    Attributes:
        gb: Its memory in 1e9 bytes, as it is sold.
        such_as: Cards of that size.
        usable: Bytes that a training can have.
    """

    gb: int
    such_as: str
    usable: int


_CARDS = yaml.safe_load(Path(__file__).with_name("cards.yaml").read_text(encoding="utf-8"))


def cards() -> list[Card]:
    """Return all sizes, the smallest first."""
    fixed, share = _CARDS["reserve"]["fixed_gb"], _CARDS["reserve"]["share"]
    made = [
        Card(one["gb"], one["such_as"], round((one["gb"] * (1 - share) - fixed) * 1e9))
        for one in _CARDS["cards"]
    ]
    return sorted(made, key=lambda card: card.gb)


def reserve() -> str:
    """Say what is left free on every card."""
    return f"{_CARDS['reserve']['fixed_gb']:g} GB and {_CARDS['reserve']['share']:.0%} of a card"


def smallest(needed: int) -> Card | None:
    """Find the smallest card that has so many bytes to give; None where none has."""
    return next((card for card in cards() if card.usable >= needed), None)


_WORTH = 0.01  # a saving under this share of the peak is none


class Switch(Frozen):
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


class Saving(Frozen):
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


def _in_8bit(recipe: Recipe) -> Recipe:
    if recipe.parallel != "ddp":
        return recipe  # refused together
    return _every_stage(
        lambda stage: {"optimizer": "adamw_8bit"} if stage.optimizer == "adamw" else {}
    )(recipe)


def _in_4bit(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={} if recipe.base == "full" else {"quantization": "nf4"})


def _in_pieces(recipe: Recipe) -> Recipe:
    plain = all(stage.optimizer == "adamw" for stage in recipe.stages) and not recipe.compile
    if recipe.parallel != "ddp" or recipe.quantization is not None or not plain:
        return recipe  # refused together, or on some devices
    return recipe.model_copy(update={"parallel": "fsdp2"})


#: In the order in which they are tried: what changes least first.
SWITCHES: tuple[Switch, ...] = (
    Switch(
        "feature_cache: true",
        "disk space for the features",
        lambda recipe: recipe.model_copy(update={"feature_cache": recipe.feature_cache or True}),
    ),
    Switch(
        "gradient_checkpointing: true",
        "a second forward pass of every layer",
        _every_stage(lambda stage: {"gradient_checkpointing": True}),
    ),
    Switch(
        "batch_size: 1, with accumulate times the batch_size of now",
        "speed; the steps stay the same",
        _every_stage(
            lambda stage: {"batch_size": 1, "accumulate": stage.accumulate * stage.batch_size}
        ),
    ),
    Switch("optimizer: adamw_8bit", "rounded moments; needs bitsandbytes", _in_8bit),
    Switch("quantization: nf4", "a base with rounded weights; needs bitsandbytes", _in_4bit),
)

#: Switch of several processes; it is tried first.
SEVERAL = Switch(
    "parallel: fsdp2", "weights that travel between the processes in every step", _in_pieces
)


def switches_for(processes: int) -> tuple[Switch, ...]:
    """Return the switches that so many processes have."""
    return (SEVERAL, *SWITCHES) if processes > 1 else SWITCHES


def peak_of(stages: "Sequence[StageEstimate]") -> int:
    """Return the recipe's peak: its largest stage's."""
    return max(stage.peak for stage in stages)


def savings(estimator: "Estimator") -> list[Saving]:
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


def out_of_memory(recipe: Recipe, stage: Stage, error: BaseException) -> MMGraftError:
    """Make the error that ends a training for want of memory: it names what to set."""
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    return MMGraftError(f"out of memory in stage {stage.name!r}: {first}\n{advice(recipe, stage)}")


def advice(recipe: Recipe, stage: Stage) -> str:
    """Say what to set, of the switches that are not set yet; what changes least first."""
    alone = recipe.model_copy(update={"stages": [stage]})
    every = switches_for(processes())
    left = [one for one in every if one.change(alone) != alone and one.name != "feature_cache"]
    if not left:
        return "All that saves memory is set: take a shorter max_length, a smaller graft or base."
    first, *others = [switch.text for switch in left]
    more = f" (then: {'; '.join(others)})" if others else ""
    return f"Set {first}{more}, for instance with --set; `mmgraft estimate` says what each saves."


def free_memory(device: str) -> int:
    """Return the bytes that a training can have now: of the card on CUDA, else of main memory.

    A container's own limit counts where it is lower.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or no limit
        return free


def warning(plan: "Plan") -> str | None:
    """Warn of a training that needs more memory than is free; None where it fits.

    A base whose memory cannot be estimated is trained without a word of warning.
    """
    from mmgraft.training.memory.request import estimator_of_plan

    free = free_memory(plan.device)
    if plan.first >= len(plan.stages):
        return None
    try:
        stages = estimator_of_plan(plan).stages(first=plan.first)
    except MMGraftError:
        return None
    here = 1 if plan.device == "cuda" else processes_here()
    if here * peak_of(stages) <= free:
        return None
    worst = max(stages, key=lambda stage: stage.peak)
    stage = next(one for one in plan.stages if one.name == worst.stage)
    each = f" in each of {here} processes" if here > 1 else ""
    return (
        f"stage {worst.stage!r} needs about {worst.peak / 1e9:.1f} GB{each}, and "
        f"{free / 1e9:.1f} GB of {'the card' if plan.device == 'cuda' else 'main memory'} are "
        f"free. {advice(plan.recipe, stage)}"
    )
