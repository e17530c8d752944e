"""The tower's features of a set's images, from the cache that the run was trained with."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.chat.turns import images_of_all
from mmgraft.data.features import Shown, fill_cache, open_cache
from mmgraft.data.images import is_data_uri, open_images, size_of
from mmgraft.model.modeling import GraftedModel
from mmgraft.progress import say
from mmgraft.training.devices import default_workers
from mmgraft.vision.feature_cache import TowerFeatures
from mmgraft.vision.towers.base import VisionTower

FOLDER = "features"
#: The tower's features of image files, ``(sum of entries, tower width)``.
Features = Callable[[list[Path]], Tensor]


def image_inputs(
    device: torch.device,
    processor: GraftProcessor,
    rows: Sequence[Encoded],
    features: Features | None,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Return the images of a batch as inputs of the forward: features where given, else pixels.

    Args:
        device: Where the inputs go.
        processor: It makes images into tensors.
        rows: The batch.
        features: The tower's features of image files.
        names: What errors call each row.

    Raises:
        UsageError: An image cannot be read.
    """
    images = [image for row in rows for image in row.images]
    if not images:
        return {}
    given = processor.images_of(rows)
    if features is not None:
        given["image_features"] = features([Path(image) for image in images])
    else:
        named = zip(rows, names, strict=True)
        opened = [image for row, name in named for image in open_images(row.images, name)]
        given["pixel_values"] = processor.pixels(opened)
    for name in given.keys() & {"image_features", "pixel_values"}:  # the others are read here
        given[name] = given[name].to(device, non_blocking=True)
    return given


def run_features(model: GraftedModel, run: Path, items: Sequence[Shown]) -> Features | None:
    """Return features of image files ``(sum of entries, tower width)``, each computed once.

    Args:
        model: With its tower.
        run: Whose cache is used: the recipe's folder of features, else one in the run.
        items: Whose images are computed now.

    Returns:
        None where images are no files, or more than the cache holds: then each is computed when
        it is shown.

    Raises:
        UsageError: An image that cannot be read; names the item.
    """
    tower = model.vision_tower
    images = [image for item in items for image in images_of_all(item.messages)]
    if tower is None or not images:
        return None
    if not all(isinstance(image, str) and not is_data_uri(image) for image in images):
        return None
    recipe = model.workflow().record.recipe or {}
    named = recipe.get("feature_cache")
    folder = Path(named).expanduser() if isinstance(named, str) else run / FOLDER
    cache = open_cache(tower, folder)
    vector_bytes = tower.hidden_size * cache.dtype.itemsize
    if _vectors(tower, items) * vector_bytes > cache.max_bytes:
        return None
    count = fill_cache(cache, tower, items, workers=default_workers(tower.device.type))
    say(f"features of {count} images are in {cache.folder}")
    compute = TowerFeatures(tower)
    return lambda paths: torch.cat(cache.get_many(paths, compute))


def _vectors(tower: VisionTower, items: Sequence[Shown]) -> int:
    """Feature vectors of all different images."""
    first = {image: item.where for item in items for image in images_of_all(item.messages)}
    if tower.fixed_plan is not None:
        return len(first) * tower.num_patches
    return sum(tower.entries(tower.plan(size_of(image, where))) for image, where in first.items())
