"""Tower features of all images of a stage, computed once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from mmgraft.data.content import images_of_all
from mmgraft.data.images import is_data_uri, open_image
from mmgraft.errors import UsageError
from mmgraft.model.feature_cache import FeatureCache, tower_features
from mmgraft.model.vision.base import VisionTower


class Shown(Protocol):
    """A row to train on, or an item to evaluate on."""

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """The conversation."""
        ...

    @property
    def where(self) -> str:
        """Its name in errors."""
        ...


def open_cache(tower: VisionTower, folder: Path) -> FeatureCache:
    """The cache of one tower in a folder that runs may share, in the tower's own precision."""
    stored = torch.bfloat16 if tower.dtype == torch.bfloat16 else torch.float32
    return FeatureCache(folder, tower.fingerprint(), dtype=stored)


def fill_cache(
    cache: FeatureCache,
    tower: VisionTower,
    rows: Sequence[Shown],
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compute what is missing, in one go; gives the number of different image files.

    Raises:
        UsageError: A row whose image is no file, or a file that cannot be read.
    """
    found: dict[Path, Shown] = {}  # the first row that shows a file
    for row in rows:
        for image in images_of_all(row.messages):
            found.setdefault(Path(_file(image, row)), row)
    plain = tower_features(tower)

    def compute(paths: list[Path]) -> torch.Tensor:
        try:
            return plain(paths)
        except UsageError:
            for path in paths:
                open_image(path, found[path].where)  # the same error, with its row
            raise

    cache.get_many(sorted(found), compute, progress=progress)
    return len(found)


def _file(image: object, row: Shown) -> str:
    if isinstance(image, str) and not is_data_uri(image):
        return image
    raise UsageError(
        f"{row.where}: the row holds its image in itself, and feature_cache keeps features of "
        "image files; write the image as a file, or set feature_cache: false"
    )
