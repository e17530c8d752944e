"""Single tensors of a base, read from its shards one by one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mmgraft.basefiles.files import ModelFiles
from mmgraft.basefiles.tensor_files import DTYPES, TensorEntry, read_headers
from mmgraft.basefiles.whole import load_whole
from mmgraft.errors import UsageError


class TensorReader:
    """Reads tensors of a base by name; opening it reads the headers of the shards alone.

    A base in ``.bin`` or GGUF files (``files.slow``) is loaded whole at the first access instead.

    Args:
        files: The base's files.

    Raises:
        UsageError: A shard is missing, cut short or no safetensors file.
    """

    def __init__(self, files: ModelFiles) -> None:
        self.files = files
        self._entries = {} if files.slow else read_headers(files.path)
        self._open: dict[Path, Any] = {}
        self._loaded: dict[str, torch.Tensor] | None = None

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards; the tensors already read stay valid."""
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()

    def keys(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._slow_tensors() if self.files.slow else self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def entry(self, key: str) -> TensorEntry | None:
        """Return where a tensor lies on disk; None on the slow path."""
        return self._entries.get(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._slow_tensors()[key].shape) if self.files.slow else self._at(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        if self.files.slow:
            return self._slow_tensors()[key].dtype
        name = self._at(key).dtype
        if name not in DTYPES:
            raise UsageError(f"{key} of {self.files.id} is of type {name}, which cannot be read")
        return DTYPES[name]

    def main_dtype(self) -> torch.dtype:
        """Return the dtype of the first tensor of floating point numbers."""
        kinds = (self.dtype(key) for key in self)
        return next((kind for kind in kinds if kind.is_floating_point), torch.float32)

    def get(self, key: str) -> torch.Tensor:
        """Read one tensor."""
        return self.lazy(key)[...]

    def lazy(self, key: str) -> Any:
        """Return something that reads the tensor when it is indexed with ``...``."""
        if self.files.slow:
            return self._slow_tensors()[key]
        file = self._at(key).file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt").__enter__()
        return self._open[file].get_slice(key)

    def _at(self, key: str) -> TensorEntry:
        try:
            return self._entries[key]
        except KeyError:
            raise UsageError(f"{self.files.id} has no tensor {key!r}") from None

    def _slow_tensors(self) -> dict[str, torch.Tensor]:
        if self._loaded is None:
            state = load_whole(self.files, dtype="auto").state_dict().items()
            self._loaded = {name: one for name, one in state if isinstance(one, torch.Tensor)}
        return self._loaded
