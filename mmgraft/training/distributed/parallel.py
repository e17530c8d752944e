"""Several processes: how many there are, and which ways of sharing a training can work."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from mmgraft.errors import UsageError
from mmgraft.recipes.recipe import Recipe

#: Since then one group of parameters may hold a frozen base in bf16 and a graft in fp32.
_FSDP2_TORCH = "2.8"


_SPLIT = (
    "to split layers over processes (Megatron or a parallelism configuration), which is not "
    "built here",
    "parallel=ddp or fsdp2",
)
#: Variables of its environment, what they say, and what to write instead.
_OF_ACCELERATE = {
    "ACCELERATE_USE_FSDP": (
        "with FSDP, whose plan does not know grafts, and which on a CPU trains with DDP without "
        "saying so",
        "parallel=fsdp2: mmgraft shards the model itself",
    ),
    "ACCELERATE_USE_DEEPSPEED": (
        "with DeepSpeed, which is not built here",
        "parallel=fsdp2: mmgraft shards the model itself",
    ),
    "ACCELERATE_USE_MEGATRON_LM": _SPLIT,
    "ACCELERATE_USE_PARALLELISM_CONFIG": _SPLIT,
    "ACCELERATE_DYNAMO_BACKEND": (
        "with a dynamo backend, which would compile the whole model",
        "compile=true: mmgraft compiles layers",
    ),
}


def processes() -> int:
    """Return how many processes train together, as torchrun, accelerate or ``--processes`` says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def any_rank(found: bool, device: torch.device, ranks: int) -> bool:
    """Tell whether any process has found it; all of them call this together."""
    if ranks == 1:
        return found
    flag = torch.tensor([int(found)], device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def of_all_ranks(item: Any, ranks: int) -> list[Any]:
    """Collect an object of every process, by rank; all of them call this together."""
    parts = [item] * ranks
    if ranks > 1:
        torch.distributed.all_gather_object(parts, item)
    return parts


def way_on(run: Path, count: int | None = None) -> str:
    """Write the command that goes on with a run, in as many processes as now or as are given."""
    count = count or processes()
    return f"mmgraft train {run} --resume" + (f" --processes {count}" if count > 1 else "")


def check_count(run: Path, progress: Mapping[str, Any] | None, count: int) -> None:
    """Refuse to go on with another number of processes: steps would have other rows.

    Args:
        run: The run folder.
        progress: Of the run; one of an earlier mmgraft does not say how many there were.
        count: Processes that would train.

    Raises:
        UsageError: There were more or fewer.
    """
    progress = progress or {}
    before = progress.get("processes", count)
    done = len(progress.get("finished", ())) == len(progress.get("stages", ()))
    if before != count and not done:
        raise UsageError(
            f"{run} is trained in {before} process{'es' * (before > 1)}, and this is {count}: a "
            "step would take other rows. Go on with: "
            f"{way_on(run, before)}\nor begin anew, from the graft as it is now, with --restart"
        )


def processes_here() -> int:
    """Return how many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes()))


def check_parallel(recipe: Recipe, device: str, count: int) -> None:
    """Refuse what several processes cannot do together, before anything is loaded.

    One process trains by itself, whatever ``parallel`` says.

    Args:
        recipe: Its ``parallel`` says how.
        device: ``cuda``, ``mps`` or ``cpu``.
        count: Processes.

    Raises:
        UsageError: Accelerate was configured to share the training in another way; a way that
            this device, this torch or 4-bit cannot go.
    """
    _check_accelerate(recipe)
    if count == 1:
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if device == "cuda" and here > torch.cuda.device_count():
        raise UsageError(
            f"{here} processes on a machine with {torch.cuda.device_count()} cards; give each a "
            "card of its own: --processes at most that, or --device cpu"
        )
    if device == "mps":
        raise UsageError("several processes do not train on MPS; use --device cpu, or one process")
    if recipe.parallel == "fsdp2":
        _check_fsdp2(recipe, device)


def _check_accelerate(recipe: Recipe) -> None:
    """Refuse what ``accelerate config`` has set and the recipe should say."""
    for name, (set_to, instead) in _OF_ACCELERATE.items():
        if os.environ.get(name, "no").lower() not in ("no", "false", "0", ""):
            raise UsageError(
                f"accelerate was configured {set_to}; take it out of there and write "
                f"--set {instead}"
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    for wanted in sorted({stage.precision or recipe.precision for stage in recipe.stages}):
        if precision not in ("no", wanted):
            raise UsageError(
                f"accelerate was configured with mixed_precision: {precision}, but the recipe says "
                f"precision: {wanted}; write mixed_precision: no there, because mmgraft does what "
                "the recipe says"
            )


def _check_fsdp2(recipe: Recipe, device: str) -> None:
    if Version(torch.__version__) < Version(_FSDP2_TORCH):
        raise UsageError(
            f"parallel: fsdp2 needs torch {_FSDP2_TORCH} or newer, and this is "
            f"{torch.__version__}; install a newer one, or write --set parallel=ddp"
        )
    if recipe.quantization is not None and device == "cpu":
        raise UsageError(
            f"parallel: fsdp2 with quantization: {recipe.quantization} needs CUDA: on a CPU "
            "bitsandbytes packs the weights anew while it runs; write --set parallel=ddp, or "
            "leave quantization out"
        )
