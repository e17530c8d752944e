"""Single tensors of a base, read from its shards when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from mmgraft.basefiles.files import ModelFiles
from mmgraft.errors import UsageError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `start` and `end` are byte offsets in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorReader:
    """Reads tensors of a base by name; opening it reads the headers of the shards alone.

    A base in `.bin` or GGUF files (`files.slow`) is loaded whole at the first access instead.

    Args:
        files: the base's files.

    Raises:
        UsageError: a shard is missing, cut short or no safetensors file.
    """

    def __init__(self, files: ModelFiles) -> None:
        self.files = files
        self._entries = {} if files.slow else _read_headers(files.path)
        self._open: dict[Path, Any] = {}
        self._loaded: dict[str, torch.Tensor] | None = None

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the shards; the tensors already read stay valid."""
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()

    def keys(self) -> list[str]:
        """Gives the names of all tensors, sorted."""
        return sorted(self._slow_tensors() if self.files.slow else self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def entry(self, key: str) -> TensorEntry | None:
        """Tells where a tensor lies on disk; None on the slow path."""
        return self._entries.get(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Gives the shape of a tensor without reading it."""
        return tuple(self._slow_tensors()[key].shape) if self.files.slow else self._at(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Gives the dtype of a tensor without reading it."""
        if self.files.slow:
            return self._slow_tensors()[key].dtype
        name = self._at(key).dtype
        if name not in _DTYPES:
            raise UsageError(f"{key} of {self.files.id} is of type {name}, which cannot be read")
        return _DTYPES[name]

    def get(self, key: str) -> torch.Tensor:
        """Reads one tensor."""
        return self.lazy(key)[...]

    def lazy(self, key: str) -> Any:
        """Gives something that reads the tensor when it is indexed with `...`."""
        if self.files.slow:
            return self._slow_tensors()[key]
        file = self._at(key).file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt").__enter__()
        return self._open[file].get_slice(key)

    @property
    def total_bytes(self) -> int:
        """Size of all tensors together."""
        if self.files.slow:
            return sum(t.numel() * t.element_size() for t in self._slow_tensors().values())
        return sum(entry.end - entry.start for entry in self._entries.values())

    def _at(self, key: str) -> TensorEntry:
        try:
            return self._entries[key]
        except KeyError:
            raise UsageError(f"{self.files.id} has no tensor {key!r}") from None

    def _slow_tensors(self) -> dict[str, torch.Tensor]:
        if self._loaded is None:
            model = AutoModelForCausalLM.from_pretrained(
                self.files.path, gguf_file=self.files.gguf, dtype="auto"
            )
            self._loaded = {
                name: tensor
                for name, tensor in model.state_dict().items()
                if isinstance(tensor, torch.Tensor)
            }
        return self._loaded


def dtype_name(dtype: torch.dtype) -> str:
    """Gives the name that safetensors uses for a dtype, such as `BF16`."""
    return _NAMES.get(dtype, str(dtype))


def _read_headers(folder: Path) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in _shards(folder):
        entries.update(_read_header(file))
    return entries


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        whole = folder / "model.safetensors"
        files = sorted(p for p in folder.glob("*.safetensors") if "adapter" not in p.name)
        return [whole] if whole.is_file() else files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is broken ({error}); fetch the base again") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder} lacks {', '.join(missing)}; fetch the base again")
    return [folder / name for name in names]


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """Reads the header of a safetensors file: 8 bytes of length, then JSON."""
    try:
        with safe_open(file, framework="pt"):  # checks the header against the file's size
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(
            f"{file} is not a whole safetensors file ({error}); fetch the base again"
        ) from error
    start = 8 + length
    header.pop("__metadata__", None)
    return {
        name: TensorEntry(
            file,
            value["dtype"],
            tuple(value["shape"]),
            start + value["data_offsets"][0],
            start + value["data_offsets"][1],
        )
        for name, value in header.items()
    }
