"""Features of a frozen tower on disk, so that each image passes through the tower once."""

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmgraft.errors import MMGraftError, UsageError
from mmgraft.vision.images import StoredImage, load_image
from mmgraft.vision.towers.base import VisionTower

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_STALE_SECONDS = 3600

#: An image file, or one inside another file.
ImageFile = Path | StoredImage

#: The features of some images, each (vectors, hidden).
Compute = Callable[[list[ImageFile]], Sequence[Tensor]]


class FeatureCache:
    """Features in a few shards, found by the bytes of the image; images may differ in length.

    An image's key is the SHA-256 of its file's bytes; the folder's name holds the tower's
    fingerprint (its weights, layer and preprocessing) and the stored dtype. Shards are written to a
    temporary name, synced and renamed, and never changed, so that processes can share a cache; a
    shard that fails its checksum is removed and its images are computed again.

    Args:
        folder: The cache folder, shared by any number of towers.
        tower_fingerprint: ``VisionTower.fingerprint`` of the tower.
        max_bytes: Bound on the whole cache folder: the shards least recently used go first.
        dtype: Dtype on disk and of what is returned: float32 or bfloat16.
        shard_bytes: Size at which a shard is written.
    """

    def __init__(
        self,
        folder: str | Path,
        tower_fingerprint: str,
        max_bytes: int = 20 * 2**30,
        dtype: torch.dtype = torch.float32,
        shard_bytes: int = 64 * 2**20,
    ) -> None:
        self.root = Path(folder)
        self.max_bytes = max_bytes
        self.dtype = dtype
        self.shard_bytes = shard_bytes
        name = f"{tower_fingerprint[:32]}-{str(dtype).removeprefix('torch.')}"
        self.folder = self.root / name
        self._shards: dict[Path, Sequence[Tensor]] = {}
        self._rows: dict[str, tuple[Path, int]] = {}
        self._digests: dict[tuple[str, int, int], str] = {}

    def get_many(
        self,
        paths: Sequence[str | ImageFile],
        compute: Compute,
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Tensor]:
        """Features of image files, computed where they are not stored yet.

        Call it once with all images of a data set rather than once a step: what one call computes
        shares shards.

        Args:
            paths: Image files, or images inside others; equal images are computed once.
            compute: Features of some files, one tensor a file. See ``TowerFeatures``.
            batch_size: Files that ``compute`` gets at a time.
            progress: Called with (computed, to compute) after every batch.

        Returns:
            One (vectors, hidden) tensor a path, in order, on the CPU; parts of shared storage, not
            to be written to.

        Raises:
            UsageError: From ``load_image``, for a missing or broken file.
        """
        images = [Path(path) if isinstance(path, str) else path for path in paths]
        keys = [self._digest(image) for image in images]
        if any(key not in self._rows for key in keys):
            self._read_new_shards()
        found: dict[str, Tensor] = {}
        missing: dict[str, ImageFile] = {}
        used: set[Path] = set()
        for key, image in zip(keys, images, strict=True):
            if key in self._rows:
                shard, row = self._rows[key]
                found[key] = self._shards[shard][row]
                used.add(shard)
            else:
                missing[key] = image
        for shard in used:
            with contextlib.suppress(OSError):
                os.utime(shard)
        if missing:
            for part_keys, features in self._compute(missing, compute, batch_size, progress):
                found.update(zip(part_keys, self._store(part_keys, features), strict=True))
            self._evict()
        return [found[key] for key in keys]

    def part(self, images: Sequence[ImageFile], rank: int, ranks: int) -> list[ImageFile]:
        """Return the images that one of several processes computes; equal ones have the same."""
        if ranks == 1:
            return list(images)
        keys: list[str] = []
        for image in images:
            try:
                keys.append(self._digest(image))
            except (UsageError, OSError, EOFError):  # which is said when its features are wanted
                keys.append(str(image))
        own = set(sorted(set(keys))[rank::ranks])
        return [image for image, key in zip(images, keys, strict=True) if key in own]

    def _compute(
        self,
        missing: dict[str, ImageFile],
        compute: Compute,
        batch_size: int,
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Keys and features of a shard's worth of images at a time."""
        keys: list[str] = []
        found: list[Tensor] = []
        size = done = 0
        todo = list(missing)
        batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
        files = [[missing[key] for key in batch] for batch in batches]
        made = compute.each(files) if isinstance(compute, TowerFeatures) else map(compute, files)
        for batch, features in zip(batches, made, strict=True):
            keys += batch
            found += [one.detach().to(device="cpu", dtype=self.dtype) for one in features]
            size += sum(one.nbytes for one in found[-len(batch) :])
            done += len(batch)
            if progress is not None:
                progress(done, len(todo))
            if size >= self.shard_bytes:
                yield keys, found
                keys, found, size = [], [], 0
        if found:
            yield keys, found

    def _digest(self, path: ImageFile) -> str:
        try:
            if isinstance(path, StoredImage):
                return path.digest()
            stat = path.stat()
            known = (str(path), stat.st_mtime_ns, stat.st_size)
            if known not in self._digests:
                self._digests[known] = hashlib.sha256(path.read_bytes()).hexdigest()
        except (OSError, EOFError):
            load_image(path)  # says what is wrong with the file
            raise
        return self._digests[known]

    def _read_new_shards(self) -> None:
        """Take in the shards that this or another process has written since."""
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            if path in self._shards:
                continue
            try:
                keys, features = _read_shard(path)
            except FileNotFoundError:
                continue  # another process evicted it
            except (SafetensorError, ValueError, KeyError, OSError) as error:
                logger.warning("Removing the broken feature shard %s: %s", path, error)
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            self._add(path, keys, features)

    def _add(self, path: Path, keys: list[str], features: Sequence[Tensor]) -> None:
        self._shards[path] = features
        for row, key in enumerate(keys):
            self._rows.setdefault(key, (path, row))

    def _store(self, keys: list[str], features: Sequence[Tensor]) -> Sequence[Tensor]:
        """Write one shard and return it mapped from the file, so that memory can be given back.

        A full disk costs the cache, not the work: the features then stay in memory.
        """
        path = self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{_SUFFIX}"
        temporary = path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            flat = torch.cat(list(features))
            offsets = torch.tensor([0, *map(len, features)]).cumsum(0)
            metadata = {"keys": json.dumps(keys), "crc32": str(_checksum(flat))}
            save_file({"features": flat, "offsets": offsets}, temporary, metadata=metadata)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            _, features = _read_shard(path)
        except (OSError, SafetensorError, ValueError) as error:
            logger.warning("Features are not kept in %s: %s", self.folder, error)
            with contextlib.suppress(OSError):
                temporary.unlink()
        self._add(path, keys, features)
        return features

    def _evict(self) -> None:
        """Remove the shards used longest ago until the folder is within ``max_bytes``."""
        shards: list[tuple[float, int, Path]] = []
        for path in self.root.glob("*/*"):
            try:
                stat = path.stat()
            except OSError:
                continue
            if path.suffix == _SUFFIX:
                shards.append((stat.st_mtime, stat.st_size, path))
            elif path.suffix == ".tmp" and time.time() - stat.st_mtime > _STALE_SECONDS:
                with contextlib.suppress(OSError):
                    path.unlink()
        total = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if total <= self.max_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


@dataclass(eq=False)
class TowerFeatures:
    """A ``compute`` for ``FeatureCache.get_many``: read, preprocess, run the tower.

    Attributes:
        tower: Runs here, in the process that asks.
        workers: Processes that read and preprocess; 0 does that here too.
        explain: Is called with the files of which one cannot be read, before the error passes.

    Raises:
        UsageError: When called, for a missing or broken image file.
        MMGraftError: When called, where the features are not finite.
    """

    tower: VisionTower
    workers: int = 0
    explain: Callable[[list[ImageFile]], None] = lambda paths: None

    def __call__(self, paths: list[ImageFile]) -> Sequence[Tensor]:
        """Compute the features of a few files."""
        try:
            return self._see(*_read(paths, self.tower.preprocess))
        except UsageError:
            self.explain(paths)
            raise

    def each(self, batches: Sequence[list[ImageFile]]) -> Iterator[Sequence[Tensor]]:
        """Compute the features of many batches, read ahead of the tower by the workers."""
        workers = min(self.workers, len(batches) - 1)
        if workers < 1:
            yield from map(self, batches)
            return
        reading = _Reading(batches, self.tower.preprocess)
        own = torch.Generator()  # or it would draw from the numbers of a training
        loader = DataLoader(reading, batch_size=None, num_workers=workers, generator=own)
        for batch, read in zip(batches, loader, strict=True):
            yield self(batch) if read is None else self._see(*read)

    def _see(self, pixels: Tensor, sizes: Sequence[tuple[int, int]]) -> Sequence[Tensor]:
        tower = self.tower
        plans = [tower.plan(size) for size in sizes]
        features = tower.encode(pixels, plans)
        if not torch.isfinite(features).all():
            raise MMGraftError(
                f"{tower.spec.name} gives features that are not finite in {tower.dtype}: load the "
                "tower in float32."
            )
        return features.split([tower.entries(plan) for plan in plans])


class _Reading(Dataset[Any]):
    """Batches as workers read them; None for one that the process that asks must see fail."""

    def __init__(self, batches: Sequence[list[ImageFile]], preprocess: Any) -> None:
        self.batches, self.preprocess = batches, preprocess

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, at: int) -> tuple[Tensor, list[tuple[int, int]]] | None:
        try:
            return _read(self.batches[at], self.preprocess)
        except UsageError:
            return None


def _read(paths: list[ImageFile], preprocess: Any) -> tuple[Tensor, list[tuple[int, int]]]:
    """Read some images: their pixels, and their sizes."""
    images = [load_image(path) for path in paths]
    return preprocess(images), [image.size for image in images]


def _checksum(features: Tensor) -> int:
    return zlib.crc32(features.contiguous().view(-1).view(torch.uint8).numpy().data)


def _read_shard(path: Path) -> tuple[list[str], Sequence[Tensor]]:
    with safe_open(path, framework="pt") as shard:
        metadata = shard.metadata() or {}
        features = shard.get_tensor("features")
        ragged = "offsets" in shard.keys()  # noqa: SIM118  (no mapping)
        offsets = shard.get_tensor("offsets") if ragged else None
    keys = json.loads(metadata["keys"])
    if int(metadata["crc32"]) != _checksum(features):
        raise ValueError("its checksum does not match")
    # Version 0.1 wrote (k, P, hidden).
    found = features.unbind() if offsets is None else features.split(offsets.diff().tolist())
    if len(keys) != len(found):
        raise ValueError("it does not hold what it names")
    return keys, found
