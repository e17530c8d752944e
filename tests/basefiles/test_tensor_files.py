"""Tensor files written from lazy tensors are what safetensors itself reads and writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmgraft.basefiles.tensor_files import LazyTensor, open_tensors, write_shards
from mmgraft.errors import UsageError


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "single": torch.randn(2, 3, 4, generator=generator).transpose(0, 2),  # not contiguous
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4),
    }


def lazily(tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    }


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def test_written_file_is_read_by_safetensors(tmp_path: Path) -> None:
    write_shards(tmp_path, "a", lazily(some_tensors()), {"method": "iaa"})
    assert_same(load_file(tmp_path / "a.safetensors"), some_tensors())
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "method": "iaa"}


def test_tensors_that_share_memory_are_written_twice(tmp_path: Path) -> None:
    """As embedding and head of a pickled checkpoint do."""
    one = torch.arange(6.0).view(2, 3)
    write_shards(tmp_path, "a", lazily({"one": one, "two": one, "turned": one.t()}))
    read = load_file(tmp_path / "a.safetensors")
    assert_same(read, {"one": one, "two": one, "turned": one.t()})


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {name: torch.full((4,), float(ord(name))) for name in "abcde"}
    written = write_shards(tmp_path, "model", lazily(tensors), max_bytes=32)
    assert written[-1] == "model.safetensors.index.json"
    assert written[0] == "model-00001-of-00003.safetensors"
    index = json.loads((tmp_path / written[-1]).read_text())
    assert index["metadata"]["total_size"] == 80
    assert set(index["weight_map"]) == set(tensors)
    for name, place in index["weight_map"].items():
        assert name in load_file(tmp_path / place)
    reopened = {name: lazy.read() for name, lazy in open_tensors(tmp_path).items()}
    assert_same(reopened, tensors)


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2), "b": torch.zeros(50), "c": torch.zeros(2)}
    assert len(write_shards(tmp_path, "graft", lazily(tensors), max_bytes=16)) == 3


def test_small_ones_need_no_index(tmp_path: Path) -> None:
    assert write_shards(tmp_path, "graft", lazily(some_tensors())) == ["graft.safetensors"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_pickled_checkpoints_are_read(tmp_path: Path, legacy: bool) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    half = dict(list(tensors.items())[:2])
    rest = {name: tensor for name, tensor in tensors.items() if name not in half}
    for number, part in enumerate((half, rest), start=1):
        path = tmp_path / f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(part, path, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "training_args.bin").write_bytes(b"no tensors in here")
    opened = open_tensors(tmp_path)
    assert opened["half"].shape == (3, 5)
    assert_same({name: lazy.read() for name, lazy in opened.items()}, tensors)


def test_other_files_beside_the_checkpoint_are_left_alone(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "samples.safetensors")
    assert set(open_tensors(tmp_path)) == {"a"}


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(4) for name in "ab"}
    written = write_shards(tmp_path, "model", lazily(tensors), max_bytes=16)
    (tmp_path / written[1]).unlink()
    with pytest.raises(UsageError, match="fetch it again"):
        open_tensors(tmp_path)


def test_no_tensors_and_broken_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no tensors"):
        open_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(UsageError, match="fetch it again"):
        open_tensors(tmp_path)
