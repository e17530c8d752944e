"""The feature cache: computed once, found by bytes, bounded, shared, and never trusted blindly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmgraft.errors import MMGraftError, UsageError
from mmgraft.vision import feature_cache
from mmgraft.vision.feature_cache import FeatureCache, TowerFeatures
from tiny_towers import picture, tiny_tower
from waiting import LAST


class Counted:
    """Features that are the file's bytes; remembers what it was asked for."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, paths: list[Path]) -> Tensor:
        self.batches.append([path.name for path in paths])
        return torch.stack([self.of(path) for path in paths])

    @property
    def names(self) -> list[str]:
        return [name for batch in self.batches for name in batch]

    @staticmethod
    def of(path: Path) -> Tensor:
        return torch.full((2, 3), float(path.read_bytes().decode()))


def files(folder: Path, count: int, first: int = 0) -> list[Path]:
    paths = [folder / f"{number}.png" for number in range(first, first + count)]
    for path in paths:
        path.write_text(path.stem)
    return paths


def shards(cache: FeatureCache) -> list[Path]:
    return sorted(cache.root.rglob("*.safetensors"))


def check(features: list[Tensor], paths: list[Path]) -> None:
    assert [row.tolist() for row in features] == [Counted.of(path).tolist() for path in paths]


def test_only_what_is_missing_is_computed_in_batches(tmp_path: Path) -> None:
    paths = files(tmp_path, 7)
    compute = Counted()
    cache = FeatureCache(tmp_path / "cache", "tower")
    check(cache.get_many(paths[:3], compute), paths[:3])
    check(cache.get_many(paths[::-1], compute, batch_size=3), paths[::-1])
    assert compute.batches[1:] == [["6.png", "5.png", "4.png"], ["3.png"]]
    fresh = FeatureCache(tmp_path / "cache", "tower")
    check(fresh.get_many(paths, compute), paths)
    assert len(compute.batches) == 3
    assert len(shards(cache)) == 2
    assert not list(cache.root.rglob("*.tmp"))


def test_key_is_the_bytes_and_the_tower(tmp_path: Path) -> None:
    first, second = files(tmp_path, 2)
    second.write_text("0")  # the same picture under another name
    compute = Counted()
    cache = FeatureCache(tmp_path / "cache", "a" * 64)
    check(cache.get_many([first, second, first], compute), [first, second, first])
    assert compute.names == ["0.png"]
    first.write_text("5")
    check(cache.get_many([first], compute), [first])
    assert len(compute.names) == 2
    FeatureCache(tmp_path / "cache", "b" * 64).get_many([first], compute)
    FeatureCache(tmp_path / "cache", "a" * 64, dtype=torch.bfloat16).get_many([first], compute)
    assert len(compute.names) == 4


def test_stored_dtype(tmp_path: Path) -> None:
    def compute(paths: list[Path]) -> Tensor:
        return torch.full((len(paths), 2, 3), 1 / 3)

    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(2):
            cache = FeatureCache(tmp_path / "cache", "tower", dtype=dtype)
            (row,) = cache.get_many(files(tmp_path, 1), compute)
            assert row.dtype == dtype
            assert torch.equal(row, torch.full((2, 3), 1 / 3, dtype=dtype))


def test_many_pictures_make_few_shards(tmp_path: Path) -> None:
    paths = files(tmp_path, 1000)
    seen: list[tuple[int, int]] = []
    cache = FeatureCache(tmp_path / "cache", "tower", shard_bytes=10_000)  # 24 bytes a picture
    check(cache.get_many(paths, Counted(), progress=lambda *at: seen.append(at)), paths)
    assert len(shards(cache)) == 3
    assert seen[0] == (32, 1000)
    assert seen[-1] == (1000, 1000)


@pytest.mark.parametrize("damage", ["flip", "cut", "text", "swap"])
def test_broken_shard_is_noticed_and_computed_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = files(tmp_path, 4)
    FeatureCache(tmp_path / "cache", "tower").get_many(paths, Counted())
    cache = FeatureCache(tmp_path / "cache", "tower")
    (shard,) = shards(cache)
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    elif damage == "cut":
        del data[-8:]
    elif damage == "text":
        data = bytearray(b"nonsense")
    else:
        data[-24:], data[-48:-24] = data[-48:-24], data[-24:]
    shard.write_bytes(data)
    compute = Counted()
    check(cache.get_many(paths, compute), paths)
    assert len(compute.names) == 4
    assert "broken feature shard" in caplog.text
    assert not shard.exists()
    check(FeatureCache(tmp_path / "cache", "tower").get_many(paths, compute), paths)
    assert len(compute.names) == 4


def test_least_recently_used_shards_go_first(tmp_path: Path) -> None:
    paths = files(tmp_path, 4)
    cache = FeatureCache(tmp_path / "cache", "tower")
    other = FeatureCache(tmp_path / "cache", "other")
    for age, (owner, path) in enumerate(
        [(other, paths[0]), (cache, paths[0]), (cache, paths[1]), (cache, paths[2])]
    ):
        before = set(shards(cache))
        owner.get_many([path], Counted())
        (new,) = set(shards(cache)) - before
        os.utime(new, (1000 + age, 1000 + age))
    oldest, second, third, fourth = sorted(shards(cache), key=lambda path: path.stat().st_mtime)
    cache.get_many([paths[0]], Counted())  # uses the second oldest
    size = fourth.stat().st_size
    cache.max_bytes = 3 * size + 100
    check(cache.get_many([paths[3]], Counted()), [paths[3]])
    left = shards(cache)
    assert oldest not in left  # another tower's
    assert third not in left
    assert {second, fourth} < set(left)
    assert len(left) == 3
    # What this run has in memory it goes on using; a new one computes it again.
    check(cache.get_many(paths, Counted()), paths)
    compute = Counted()
    FeatureCache(tmp_path / "cache", "tower").get_many(paths, compute)
    assert compute.names == ["1.png"]


def test_full_disk_costs_the_cache_not_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(tensors: Any, path: Path, **_: Any) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "save_file", full)
    paths = files(tmp_path, 3)
    compute = Counted()
    cache = FeatureCache(tmp_path / "cache", "tower")
    check(cache.get_many(paths, compute), paths)
    check(cache.get_many(paths, compute), paths)
    assert len(compute.names) == 3
    assert "No space left" in caplog.text
    assert not [path for path in cache.root.rglob("*") if path.is_file()]


WORKER = """
import sys
from pathlib import Path
import torch
from mmgraft.vision.feature_cache import FeatureCache

folder = Path(sys.argv[1])
paths = [folder / f"{number}.png" for number in range(60)]
cache = FeatureCache(folder / "cache", "tower", max_bytes=6000, shard_bytes=200)
def compute(batch):
    return torch.stack([torch.full((2, 3), float(path.read_text())) for path in batch])
for start in range(0, 60, 7):
    part = paths[start:] + paths[:start]
    rows = cache.get_many(part, compute, batch_size=5)
    assert [row[0, 0].item() for row in rows] == [float(path.stem) for path in part]
    cache = FeatureCache(folder / "cache", "tower", max_bytes=6000, shard_bytes=200)
"""


def test_two_processes_share_one_folder(tmp_path: Path) -> None:
    files(tmp_path, 60)
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    workers = [subprocess.Popen(command) for _ in range(2)]
    assert [worker.wait(timeout=LAST) for worker in workers] == [0, 0]


def test_other_process_results_are_found_later(tmp_path: Path) -> None:
    paths = files(tmp_path, 4)
    here = FeatureCache(tmp_path / "cache", "tower")
    here.get_many(paths[:1], Counted())
    FeatureCache(tmp_path / "cache", "tower").get_many(paths, Counted())
    compute = Counted()
    check(here.get_many(paths, compute), paths)
    assert compute.names == []


def test_tower_features_equal_the_tower(tmp_path: Path) -> None:
    tower = tiny_tower()
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for which, path in enumerate(paths):
        picture(which=which).save(path)
    rows = FeatureCache(tmp_path / "cache", tower.fingerprint()).get_many(
        paths, TowerFeatures(tower)
    )
    expected = tower(tower.preprocess([picture(), picture(which=1)]))
    assert torch.equal(torch.stack(rows), expected)


def test_workers_read_ahead_and_change_neither_features_nor_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = tiny_tower()
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for which, path in enumerate(paths):
        picture(20 + which, which=which % 2).save(path)
    plain = FeatureCache(tmp_path / "a", "t").get_many(paths, TowerFeatures(tower), batch_size=2)
    state = torch.get_rng_state()
    elsewhere = read_elsewhere(os.getpid())
    with monkeypatch.context() as patched:
        patched.setattr(feature_cache, "_read", lambda *_: pytest.fail("read here"))
        patched.setattr(feature_cache._Reading, "__getitem__", elsewhere)
        cache = FeatureCache(tmp_path / "b", "t")
        found = cache.get_many(paths, TowerFeatures(tower, workers=2), batch_size=2)
    assert all(map(torch.equal, found, plain))
    assert torch.equal(torch.get_rng_state(), state)
    paths[4].write_text("broken")
    named: list[list[Path]] = []
    compute = TowerFeatures(tower, workers=2, explain=named.append)
    with pytest.raises(UsageError, match=r"cannot be read: .*4\.png"):
        FeatureCache(tmp_path / "c", "t").get_many(paths, compute, batch_size=2)
    assert named == [paths[4:]]


def read_elsewhere(here: int):
    read = feature_cache._read

    def item(self: Any, at: int) -> Any:
        assert os.getpid() != here
        return read(self.batches[at], self.preprocess)

    return item


def test_bad_pictures_and_bad_features_are_named(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", "tower")
    with pytest.raises(UsageError, match=r"not found: .*none\.png"):
        cache.get_many([tmp_path / "none.png"], Counted())
    (broken,) = files(tmp_path, 1)
    with pytest.raises(UsageError, match=r"cannot be read: .*0\.png"):
        cache.get_many([broken], TowerFeatures(tiny_tower()))
    tower = tiny_tower()
    next(tower.parameters()).data.fill_(float("nan"))
    picture().save(tmp_path / "a.png")
    with pytest.raises(MMGraftError, match="not finite"):
        cache.get_many([tmp_path / "a.png"], TowerFeatures(tower))
    assert shards(cache) == []


def test_a_shard_of_version_0_1_is_read(tmp_path: Path) -> None:
    """It held equally long features as one tensor, and no offsets."""
    paths = files(tmp_path, 3)
    cache = FeatureCache(tmp_path / "cache", "tower")
    cache.get_many(paths, Counted())
    (shard,) = shards(cache)
    keys, features = feature_cache._read_shard(shard)
    old = torch.stack(list(features))
    metadata = {"keys": json.dumps(keys), "crc32": str(feature_cache._checksum(old))}
    save_file({"features": old}, shard, metadata=metadata)
    compute = Counted()
    check(FeatureCache(tmp_path / "cache", "tower").get_many(paths, compute), paths)
    assert compute.names == []
