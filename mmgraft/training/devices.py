"""Devices of a run, and the packages that it needs."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mmgraft.errors import UsageError

if TYPE_CHECKING:
    from mmgraft.recipes.recipe import Recipe

#: In the order in which they are taken.
DEVICES = ("cuda", "mps", "cpu")

_TRACKER_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}

_WORKERS = 4  # processes that load rows for a card
_BF16 = (8, 0)  # the first CUDA capability with arithmetic in bf16

#: Module and package of each kind of flash attention.
_FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}


def pick_device(wanted: str | None = None) -> str:
    """Choose the device that is wanted, else the first that is there: CUDA, MPS, CPU.

    Raises:
        UsageError: For a device that is not there, or that no one knows.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted is None:
        return next(name for name in DEVICES if there[name])
    if wanted not in there:
        hint = " (choose a card with CUDA_VISIBLE_DEVICES)" if wanted.startswith("cuda:") else ""
        raise UsageError(f"no device {wanted!r}; write one of {', '.join(DEVICES)}{hint}")
    if not there[wanted]:
        raise UsageError(
            f"--device {wanted}, but torch {torch.__version__} finds no {wanted.upper()}; install "
            f"a torch that has it, or use --device {pick_device()}"
        )
    return wanted


def default_workers(device: str) -> int:
    """Return how many processes load rows where a recipe does not say: a card must not wait."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_WORKERS, cores or 1) if device == "cuda" else 0


def with_workers(recipe: "Recipe", device: str) -> "tuple[Recipe, str]":
    """Return a recipe that says how many processes load rows on a device, and the device."""
    if recipe.workers is None:
        recipe = recipe.model_copy(update={"workers": default_workers(device)})
    return recipe, device


def slow_precision(recipe: "Recipe", device: str) -> str | None:
    """Return what to say of a card that computes in bf16 only by way of fp32; None of another."""
    if device != "cuda" or all(stage.precision == "fp32" for stage in recipe.stages):
        return None
    capability = torch.cuda.get_device_capability()
    if capability >= _BF16:
        return None
    return (
        f"{torch.cuda.get_device_name()} has no arithmetic in bf16 (CUDA capability "
        f"{capability[0]}.{capability[1]}; 8.0 has it): products are emulated, and attention takes "
        "its slow path. Write precision: fp32, or take a newer card."
    )


def check_packages(recipe: "Recipe", device: str) -> None:
    """Refuse, before anything is loaded, what needs a package or a device that is not there.

    Raises:
        UsageError: 4-bit or an 8-bit optimizer without bitsandbytes or on a device that it does
            not run on; flash attention without its package or a card; torch.compile without a
            compiler; a tracker whose package is missing.
    """
    if (flash := _FLASH_PACKAGES.get(recipe.attention or "")) is not None:
        what, (module, package) = f"attention: {recipe.attention}", flash
        if device != "cuda":
            raise UsageError(
                f"{what} needs a CUDA card, and this is {device}; write attention: sdpa"
            )
        _check_installed(what, (module,), package, "attention=sdpa")
        if any(stage.precision == "fp32" for stage in recipe.stages):
            raise UsageError(
                f"{what} takes half precision alone, and a stage has precision: fp32; write "
                "precision: bf16, or attention: sdpa"
            )
    if recipe.compile:
        _check_compiler(device)
    if recipe.quantization is not None:
        _check_bitsandbytes(f"quantization: {recipe.quantization}", device)
    for stage in recipe.stages:
        if stage.optimizer != "adamw":
            _check_bitsandbytes(f"stage {stage.name!r} with optimizer: {stage.optimizer}", device)
    if (modules := _TRACKER_PACKAGES.get(recipe.tracking)) is not None:
        _check_installed(f"tracking: {recipe.tracking}", modules, modules[0], "tracking=none")


def _check_installed(what: str, modules: Sequence[str], package: str, instead: str) -> None:
    if not any(importlib.util.find_spec(module) for module in modules):
        raise UsageError(
            f"{what} needs a package that is not installed: pip install {package}, or "
            f"--set {instead}"
        )


def _check_compiler(device: str) -> None:
    if device == "mps":
        raise UsageError("compile: true is not built for MPS; leave compile out")
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise UsageError("compile: true needs triton: pip install triton, or --set compile=false")
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    if device == "cpu" and not any(shutil.which(name) for name in names if name):
        raise UsageError(
            "compile: true needs a C++ compiler on a CPU: install g++, or --set compile=false"
        )


def _check_bitsandbytes(what: str, device: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"{what} needs bitsandbytes: pip install 'mmgraft[4bit]'")
    if device == "mps":
        raise UsageError(f"{what} does not run on MPS; use --device cpu, or a machine with CUDA")


def is_main_rank() -> bool:
    """Tell whether this process writes files and talks: the only one, or the first of several."""
    return int(os.environ.get("RANK", "0")) == 0


def memory_in_use(device: str) -> int | None:
    """Return the peak bytes of this process: of the card on CUDA, else of main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    if importlib.util.find_spec("resource") is None:  # Windows
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
