"""Too little memory: a warning before a training begins, and the error that ends one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from mmgraft.errors import MMGraftError
from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.training.distributed.parallel import processes, processes_here
from mmgraft.training.memory.switches import peak_of, switches_for

if TYPE_CHECKING:
    from mmgraft.training.plan import Plan


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


def warning(plan: Plan) -> str | None:
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
