"""Read and write tensor files one tensor at a time, so that a 70 B model needs little memory.

A safetensors file is eight bytes with the length of its header, the header as JSON (names, dtypes,
shapes, offsets), and the tensors' bytes. The header is known before the first byte of a tensor is
read, so tensors go from their source to the disk one after the other.
"""

import contextlib
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from mmgraft.errors import UsageError, first_line
from mmgraft.frozen import Frozen
from mmgraft.progress import counted
from mmgraft.textfiles import weight_files

MAX_SHARD_BYTES = 5 * 10**9

#: Each dtype by the name that safetensors has for it.
DTYPES: dict[str, torch.dtype] = str_to_torch_dtype
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that safetensors uses for a dtype, such as ``BF16``."""
    return _NAMES.get(dtype, str(dtype))


class TensorEntry(Frozen):
    """Place of one tensor: ``start`` and ``end`` are byte offsets in ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class LazyTensor(Frozen):
    """A tensor that is read when it is needed.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        read: Reads it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_headers(folder: Path, stem: str = "model") -> dict[str, TensorEntry]:
    """Return where each tensor of a folder's safetensors files lies; empty where it has none.

    Args:
        folder: A model's or a graft's.
        stem: How the files' names begin: ``model`` or ``graft``.

    Raises:
        UsageError: A shard is missing, cut short or no safetensors file.
    """
    return _headers(weight_files(folder, stem, ".safetensors"))


def _headers(files: list[Path]) -> dict[str, TensorEntry]:
    return {name: entry for file in files for name, entry in _read_header(file)}


def open_tensors(folder: Path) -> dict[str, LazyTensor]:
    """Return every tensor of a checkpoint: of its safetensors files, else of its pickled ones.

    Raises:
        UsageError: There is neither, or a file cannot be read.
    """
    found: dict[str, LazyTensor] = {}
    files: dict[Path, Any] = {}
    headers = _headers(_any_files(folder, "model", ".safetensors", "*.safetensors"))
    for name, entry in headers.items():
        if entry.file not in files:
            files[entry.file] = safe_open(entry.file, framework="pt")
        read = partial(files[entry.file].get_tensor, name)
        found[name] = LazyTensor(entry.shape, DTYPES[entry.dtype], read)
    if not found:
        for path in _any_files(folder, "pytorch_model", ".bin", "pytorch_model*.bin"):
            found.update(open_pickled(path))
    if not found:
        raise UsageError(
            f"{folder} holds no tensors (*.safetensors or pytorch_model*.bin); "
            "give the folder of a whole checkpoint"
        )
    return found


def _any_files(folder: Path, stem: str, suffix: str, pattern: str) -> list[Path]:
    """Return a checkpoint's files; all of the kind where none has transformers' name."""
    others = (path for path in folder.glob(pattern) if "adapter" not in path.name)
    return weight_files(folder, stem, suffix) or sorted(others)


def _read_header(file: Path) -> Iterator[tuple[str, TensorEntry]]:
    try:
        with safe_open(file, framework="pt"):  # checks the header against the file's size
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, "safetensors file", error) from error
    header.pop("__metadata__", None)
    for name, value in header.items():
        start, end = (8 + length + offset for offset in value["data_offsets"])
        yield name, TensorEntry(file, value["dtype"], tuple(value["shape"]), start, end)


def _damaged(file: Path, kind: str, error: Exception) -> UsageError:
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            return UsageError(
                f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
            )
    return UsageError(
        f"{file} is not a whole {kind} but corrupt ({first_line(error)}); fetch it again"
    )


def open_pickled(path: Path) -> dict[str, LazyTensor]:
    """Open the tensors of a ``.bin`` file; code in it is never run.

    Raises:
        UsageError: It is damaged, or holds something else than tensors by name.
    """
    # Mapped, not read: pages come in with the tensor that is used, and go when they must.
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise _damaged(path, "file of tensors", error) from error
        raise UsageError(
            f"{path} holds Python objects, not tensors alone, and code in it is never run; give "
            "the base as safetensors (save_pretrained writes them)"
        ) from error
    except Exception as error:  # torch raises nearly anything on broken bytes
        raise _damaged(path, "file of tensors", error) from error
    if not isinstance(state, dict) or not all(isinstance(one, Tensor) for one in state.values()):
        raise UsageError(f"{path} holds no tensors by name; give a state dict, or safetensors")
    return {
        str(name): LazyTensor(tuple(one.shape), one.dtype, lambda one=one: one)
        for name, one in state.items()
    }


def write_shards(
    folder: Path,
    stem: str,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None = None,
    max_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Write ``stem.safetensors``, or numbered shards and ``stem.safetensors.index.json``.

    One shard is in memory at a time.

    Args:
        folder: Where to write; made if it is missing.
        stem: ``model`` or ``graft``.
        tensors: The tensors to write; their order decides which share a shard.
        metadata: Strings for the headers; ``format`` is added.
        max_bytes: Largest size of a shard; a larger tensor has one of its own.

    Returns:
        Names of the files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda lazy: lazy.nbytes,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_bytes,
    )
    for name, keys in split.filename_to_tensors.items():
        read = counted(f"writing {name}", keys)
        chosen = {key: tensors[key].read().clone().contiguous() for key in read}  # two may be one
        save_file(chosen, folder / name, {"format": "pt", **(metadata or {})})
    names = list(split.filename_to_tensors)
    if not split.is_sharded:
        return names
    weight_map = dict(sorted(split.tensor_to_filename.items()))
    index = {"metadata": split.metadata, "weight_map": weight_map}
    index_name = f"{stem}.safetensors.index.json"
    (folder / index_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, index_name]
