"""Opens a published checkpoint: a folder, a Hub id, or (for a look) its headers on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from mmgraft.basefiles import fetch, resolve
from mmgraft.basefiles.files import SMALL
from mmgraft.basefiles.tensor_files import DTYPES, LazyTensor, open_tensors
from mmgraft.errors import UsageError
from mmgraft.textfiles import read_json

TOWER_FILES = ["preprocessor_config.json", "vision_config.json"]
_SMALL = [*SMALL, *TOWER_FILES]


@dataclass(frozen=True)
class Source:
    """A published checkpoint.

    Attributes:
        name: What the user called it.
        tensors: Its tensors by their published names.
        files: Small files beside them, by name.
        readable: False where only the tensors' names and shapes are known.
    """

    name: str
    tensors: Mapping[str, LazyTensor]
    files: dict[str, Path]
    readable: bool = True

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return its config.json."""
        config = self.read_json("config.json")
        if config is None:
            raise UsageError(
                f"{self.name} has no config.json; give the folder of a whole checkpoint"
            )
        return config

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return a small file's content, or None where the checkpoint lacks it.

        Raises:
            UsageError: When it is no JSON object.
        """
        if name not in self.files:
            return None
        return read_json(self.files[name], "fetch it again")


def open_source(name: str, revision: str | None = None, headers_only: bool = False) -> Source:
    """Open a checkpoint by folder or Hub id.

    Args:
        name: The folder or the id.
        revision: Commit, branch or tag on the Hub.
        headers_only: Of a Hub id fetch names and shapes only, a few MB at most.

    Raises:
        UsageError: When there is no such checkpoint, or it misses its config or tensors.
        MMGraftError: When the Hub cannot be reached.
    """
    on_hub = not Path(name).expanduser().is_dir()
    if headers_only and on_hub:
        return _from_headers(name, revision)
    found = resolve(name, revision)
    if on_hub:  # no base has such files, so they were not fetched with it
        fetch(name, found.revision, TOWER_FILES)
    return Source(name, open_tensors(found.path), _small_files(found.path))


def _small_files(folder: Path) -> dict[str, Path]:
    return {path.name: path for pattern in _SMALL for path in folder.glob(pattern)}


def _from_headers(name: str, revision: str | None) -> Source:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        metadata = HfApi().get_safetensors_metadata(name, revision=revision)
    except NotASafetensorsRepoError:
        raise UsageError(
            f"{name} holds pickled tensors, whose names cannot be read without all of them; "
            "leave --dry-run out, or download it and give its folder"
        ) from None

    def unread() -> Tensor:
        raise RuntimeError(f"only the headers of {name} were fetched")

    tensors = {
        tensor: LazyTensor(tuple(info.shape), DTYPES[info.dtype], unread)
        for file in metadata.files_metadata.values()
        for tensor, info in file.tensors.items()
    }
    files = _small_files(fetch(name, revision, _SMALL))
    return Source(name, tensors, files, readable=False)
