"""The tower's features of an arm's pictures, computed before its training is timed.

Arms share them, so that no arm's time holds what another one was spared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mmgraft.comparison.plan import ArmPlan
from mmgraft.data.bad_rows import BadRow
from mmgraft.data.indexed import Joined
from mmgraft.model.graft_file import GraftFile
from mmgraft.model.loading import local_tower
from mmgraft.model.vision.registry import load_tower
from mmgraft.training.features import fill_cache, open_cache
from mmgraft.training.stage_data import StageData


def fill_features(arm: ArmPlan, device: str, announce: Callable[[str], None]) -> None:
    """Compute the features that are not there yet, in the precision of the arm's training.

    Args:
        arm: Its recipe keeps features in a folder; its run holds a graft.
        device: Where to compute.
        announce: Told how many pictures there are.

    Raises:
        UsageError: An image that cannot be read, with its row, unless the recipe skips such rows.
    """
    recipe = arm.recipe
    assert isinstance(recipe.feature_cache, str)
    full = recipe.base == "full" or any(stage.precision == "fp32" for stage in recipe.stages)
    tower = load_tower(
        local_tower(GraftFile.read(arm.run), arm.run),
        dtype=torch.float32 if full else torch.bfloat16,
        device=device,
    )
    cache = open_cache(tower, Path(recipe.feature_cache))
    reader = StageData(recipe.on_bad_row)
    rows = Joined(
        [reader.rows(one.data or [], recipe.seed, one.image_share) for one in recipe.stages]
    )
    bad: list[BadRow] | None = [] if recipe.on_bad_row == "skip" else None
    count = fill_cache(cache, tower, rows, bad=bad)
    announce(f"{arm.name}: features of {count} images are in {cache.folder}")
    if left := len({row.key for row in [*reader.bad, *(bad or [])]}):
        announce(f"{arm.name}: {left} rows cannot be used; its training logs and leaves them out")
