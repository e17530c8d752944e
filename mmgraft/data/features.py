"""Tower features of all images of a stage, computed once and kept on disk."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from mmgraft.data.chat.turns import images_of_all
from mmgraft.data.images import is_data_uri, open_image
from mmgraft.data.rows import BadRow, Row
from mmgraft.errors import UsageError
from mmgraft.progress import working
from mmgraft.vision.feature_cache import FeatureCache, ImageFile, TowerFeatures
from mmgraft.vision.images import BadImage, StoredImage, load_image
from mmgraft.vision.towers.base import VisionTower


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
    """Return the cache of one tower in a folder that runs may share, in the tower's own precision.

    Raises:
        UsageError: A file is there instead.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"feature_cache: {folder} is a file; write true, or a folder")
    stored = torch.bfloat16 if tower.dtype == torch.bfloat16 else torch.float32
    return FeatureCache(folder, tower.features_key(), dtype=stored)


def fill_cache(
    cache: FeatureCache,
    tower: VisionTower,
    rows: Sequence[Shown],
    bad: list[BadRow] | None = None,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Compute what is missing, in one go; gives the number of different image files.

    Args:
        cache: To fill.
        tower: Computes.
        rows: Whose images are wanted.
        bad: Takes rows whose images cannot be used; None raises instead.
        workers: Processes that read images ahead of the tower.
        share: A rank and how many there are: of the files only this rank's part is looked at.

    Raises:
        UsageError: A row whose image is no file, or a file that cannot be read.
    """
    found = _files(rows, bad)
    files = cache.part(sorted(found, key=str), *share)

    def explain(paths: list[ImageFile]) -> None:
        for path in paths:
            open_image(path, rows[found[path]].where)  # the same error, with its row

    compute = TowerFeatures(tower, workers, explain)

    def fill(files: Sequence[ImageFile]) -> int:
        with working("computing features of images") as work:
            cache.get_many(files, compute, progress=work)
        return len(files)

    try:
        return fill(files)
    except UsageError:
        if bad is None:
            raise
    unusable = _unusable(files)
    bad += [
        BadRow.of(cast(Row, row), BadImage(f"{row.where}: {error}", error.fault))
        for row in rows
        for path in dict.fromkeys(map(_path, images_of_all(row.messages)))
        if path and (error := unusable.get(path))
    ]
    left = [path for path in files if path not in unusable]
    return fill(left)


def _files(rows: Sequence[Shown], bad: list[BadRow] | None) -> dict[ImageFile, int]:
    """Return the image files of all rows, and the first row that shows each."""
    found: dict[ImageFile, int] = {}
    for at, row in enumerate(rows):
        try:
            for path in [image_file(image, row.where) for image in images_of_all(row.messages)]:
                found.setdefault(path, at)
        except UsageError as error:
            if bad is None:
                raise
            bad.append(BadRow.of(cast(Row, row), error))
    return found


def _unusable(paths: Iterable[ImageFile]) -> dict[ImageFile, BadImage]:
    """Return every file that cannot be opened, and why; all are decoded, so only once one has
    failed.
    """
    errors: dict[ImageFile, BadImage] = {}
    for path in paths:
        try:
            load_image(path)
        except BadImage as error:
            errors[path] = error
    return errors


def _path(image: object) -> ImageFile | None:
    if isinstance(image, StoredImage):
        return image
    return Path(image) if isinstance(image, str) and not is_data_uri(image) else None


def image_file(image: object, where: str) -> ImageFile:
    """Return the file that an image part names.

    Raises:
        UsageError: The row holds the image in itself.
    """
    if (path := _path(image)) is not None:
        return path
    raise UsageError(
        f"{where}: the row holds its image in itself, and feature_cache keeps features of "
        "image files; write the image as a file, or set feature_cache: false"
    )
