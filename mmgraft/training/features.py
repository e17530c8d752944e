"""Tower features of all images of a stage, computed once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mmgraft.data.images import is_data_uri
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.model.feature_cache import FeatureCache, tower_features
from mmgraft.model.vision.base import VisionTower


def open_cache(tower: VisionTower, folder: Path) -> FeatureCache:
    """The cache of one tower in a folder that runs may share, in the tower's own precision."""
    stored = torch.bfloat16 if tower.dtype == torch.bfloat16 else torch.float32
    return FeatureCache(folder, tower.fingerprint(), dtype=stored)


def fill_cache(
    cache: FeatureCache,
    tower: VisionTower,
    rows: Sequence[Row],
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compute what is missing, in one go; gives the number of different image files.

    Raises:
        UsageError: A row whose image is no file, or a file that cannot be read.
    """
    paths: set[str] = set()
    for row in rows:
        for message in row.messages:
            content = message.get("content")
            for part in content if isinstance(content, list) else ():
                if part.get("type") == "image":
                    paths.add(_file(part["image"], row))
    cache.get_many(sorted(paths), tower_features(tower), progress=progress)
    return len(paths)


def _file(image: object, row: Row) -> str:
    if isinstance(image, str) and not is_data_uri(image):
        return image
    raise UsageError(
        f"{row.where}: the row holds its image in itself, and feature_cache keeps features of "
        "image files; write the image as a file, or set feature_cache: false"
    )
