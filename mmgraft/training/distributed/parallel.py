"""Several processes: how many there are, and which ways of sharing a training can work."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from mmgraft.errors import UsageError
from mmgraft.recipes.recipe import Recipe

_FSDP2_TORCH = "2.8"
"""Since then one group of parameters may hold a frozen base in bf16 and a graft in fp32."""


def processes() -> int:
    """How many processes train together; torchrun, accelerate and ``--processes`` say it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def way_on(run: Path, count: int | None = None) -> str:
    """The command that goes on with a run, in as many processes as now or as are given."""
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
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes()))


def deepspeed_config(parallel: str) -> dict[str, Any] | None:
    """The shipped DeepSpeed configuration of that name; None for what needs none.

    Neither was run yet: DeepSpeed was not there where mmgraft is tested.
    """
    if not parallel.startswith("zero") or processes() == 1:
        return None
    path = Path(__file__).parent / "deepspeed" / f"{parallel}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def check_parallel(recipe: Recipe, device: str, count: int) -> None:
    """Refuse what several processes cannot do together, before anything is loaded.

    One process trains by itself, whatever `parallel` says.

    Args:
        recipe: Its `parallel` says how.
        device: ``cuda``, ``mps`` or ``cpu``.
        count: Processes.

    Raises:
        UsageError: accelerate was configured to share the training in another way; a way that
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
    if recipe.parallel.startswith("zero"):
        _check_deepspeed(recipe, device)


def check_rows_have_images(recipe: Recipe, stage: str, without: int, count: int) -> None:
    """Refuse rows without an image where a process that has none would keep the others waiting.

    Args:
        recipe: Resolved.
        stage: Its name.
        without: Rows without an image that the stage shows.
        count: Processes.

    Raises:
        UsageError: ZeRO 3 and such rows.
    """
    if recipe.parallel == "zero3" and count > 1 and without:
        raise UsageError(
            f"stage {stage!r} has {without} rows without an image, and with parallel: zero3 a "
            "process whose rows have none would keep the others waiting for ever; write "
            "parallel: fsdp2, which trains such rows too, or give image rows alone"
        )


def _check_accelerate(recipe: Recipe) -> None:
    if _is_set("ACCELERATE_USE_FSDP"):
        raise UsageError(
            "accelerate was configured with FSDP, whose plan does not know grafts, and which on a "
            "CPU trains with DDP without saying so; take FSDP out of that configuration and write "
            "--set parallel=fsdp2: mmgraft shards the model itself"
        )
    if _is_set("ACCELERATE_USE_DEEPSPEED") and not recipe.parallel.startswith("zero"):
        raise UsageError(
            f"accelerate was configured with DeepSpeed, but the recipe says parallel: "
            f"{recipe.parallel}; write --set parallel=zero2 or zero3, which bring their own "
            "configuration, or take DeepSpeed out of accelerate's"
        )
    if _is_set("ACCELERATE_USE_MEGATRON_LM") or _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UsageError(
            "accelerate was configured to split layers over processes (Megatron or a parallelism "
            "configuration), which is not built here; take it out, and write --set parallel=ddp "
            "or fsdp2"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UsageError(
            "accelerate was configured with a dynamo backend, which would compile the whole model; "
            "take it out, and write --set compile=true: mmgraft compiles layers"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    for wanted in sorted({stage.precision or recipe.precision for stage in recipe.stages}):
        if precision not in ("no", wanted):
            raise UsageError(
                f"accelerate was configured with mixed_precision: {precision}, but the recipe says "
                f"precision: {wanted}; write mixed_precision: no there, for mmgraft does what the "
                "recipe says"
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


def _check_deepspeed(recipe: Recipe, device: str) -> None:
    if device != "cuda":
        raise UsageError(
            f"parallel: {recipe.parallel} runs on CUDA only; on this {device} write "
            "--set parallel=fsdp2, or ddp"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            f"parallel: {recipe.parallel} needs a package that is not installed: pip install "
            "deepspeed; or write --set parallel=fsdp2, which does the same without it"
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
