"""What an estimate does not count, in words."""

from __future__ import annotations

from mmgraft.recipes.recipe import Recipe


def not_counted(recipe: Recipe, device: str = "cuda", processes: int = 1) -> list[str]:
    """A sentence for each setting of a recipe that an estimate knows little of.

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
    if device == "cpu" and recipe.workers:
        found.append(f"workers: the memory of the {recipe.workers} that load rows")
    if recipe.parallel != "ddp" and processes == 1:
        found.append(f"parallel: {recipe.parallel}: one process shares nothing; give --processes N")
    if processes > 1:
        found.append(
            f"parallel: {recipe.parallel}: its parts are counted by what it does, and were never "
            "compared with a measured peak"
        )
        if recipe.parallel.startswith("zero"):
            found.append("DeepSpeed: the sizes of its buffers are an assumption; it was never run")
    return found
