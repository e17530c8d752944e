"""The files of a folder, and what is in them but for what differs from one run to the next."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from unchanged.comparing import tensor_hash, value_hash

BINARY = "<bytes>"
VERSION = "<version>"

LIMIT = 1500
"""Characters of a file up to which it is recorded whole."""

_WHOLE = ("push/README.md", "train/recipe.used.yaml")
"""Files that are recorded whole anyhow."""
_VERSIONS = ("mmgraft_version", "transformers_version")
_HASHES = ("vision_fingerprint",)
_SPEEDS = ("tokens_per_second", "memory_gb")
_TEXTS = (".md", ".yaml", ".jinja", ".txt", "")
_OTHERS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
           "preprocessor_config.json", "processor_config.json", "special_tokens_map.json",
           "trainer_state.json", "model.safetensors")  # fmt: skip
"""Files that transformers, accelerate or tokenizers write."""


class Lister:
    """Lists folders; a file that was listed already is recorded by the place where it was.

    Args:
        places: Folders of this machine by what is written instead.
    """

    def __init__(self, places: Mapping[str, Path]) -> None:
        self._places = sorted(places.items(), key=lambda one: -len(str(one[1])))
        self._seen: dict[str, str] = {}

    def list(self, name: str, folder: Path) -> dict[str, Any]:
        """Every file below a folder, by its relative name.

        Args:
            name: What the folder is called where a later one has the same file.
            folder: Any.
        """
        found: dict[str, Any] = {}
        for path in sorted(one for one in folder.rglob("*") if one.is_file()):
            file = path.relative_to(folder).as_posix()
            found[file] = self._file(f"{name}/{file}", path)
        return found

    def _file(self, place: str, path: Path) -> Any:
        content = self._content(path)
        if content is BINARY:
            return content
        first = self._first(content, place)
        if first != place:
            return f"as in {first}"
        others = path.name in _OTHERS
        if path.suffix == ".safetensors":
            self._shorten_tensors(content, place, others)
        elif place not in _WHOLE:
            content = _shortened(content)
        return {"of another package": content} if others else content

    def _first(self, content: Any, place: str) -> str:
        return self._seen.setdefault(value_hash(content), place)

    def _content(self, path: Path) -> Any:
        if path.suffix == ".safetensors":
            return _tensors(path)
        if path.name == "versions.json":
            return dict.fromkeys(json.loads(path.read_text(encoding="utf-8")), VERSION)
        if path.suffix == ".json":
            return self._plain(json.loads(path.read_text(encoding="utf-8")))
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            return [self._plain(json.loads(line)) for line in lines]
        if path.suffix in _TEXTS:
            return self._text(path.read_text(encoding="utf-8")).splitlines()
        return BINARY

    def _shorten_tensors(self, content: dict[str, Any], place: str, others: bool) -> None:
        first = self._first(content["tensors"], place)
        if first != place:
            content["tensors"] = f"those of {first}"
        if others:
            content["tensors sha256"] = value_hash(content["tensors sha256"])

    def _plain(self, value: Any) -> Any:
        """A value of JSON without versions, speeds and folders; a fingerprint by its hash."""
        if isinstance(value, dict):
            if value.keys() == {"config", "tensors"}:  # of a base; see the listing of its files
                return {f"{part} sha256": value_hash(one) for part, one in value.items()}
            return dict(self._entry(key, one) for key, one in value.items() if key not in _SPEEDS)
        if isinstance(value, list):
            return [self._plain(one) for one in value]
        return self._text(value) if isinstance(value, str) else value

    def _entry(self, key: str, value: Any) -> tuple[str, Any]:
        if key in _VERSIONS:
            return key, VERSION
        if key in _HASHES and value is not None:
            return f"{key} sha256", value
        return key, self._plain(value)

    def _text(self, text: str) -> str:
        for name, folder in self._places:
            text = text.replace(str(folder), f"<{name}>")
        text = re.sub(r"\bmmgraft \d+\.\d+[\w.+]*", f"mmgraft {VERSION}", text)
        return re.sub(r"\b[0-9a-f]{40}\b", "<commit>", text)


def _tensors(path: Path) -> dict[str, Any]:
    """Types, shapes and hashes of the tensors of a file, and what else it says."""
    shapes, hashes = {}, {}
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            shapes[name] = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            hashes[name] = tensor_hash(tensor)
        metadata = dict(sorted((file.metadata() or {}).items()))
    return {"metadata": metadata, "tensors": shapes, "tensors sha256": hashes}


def _shortened(content: Any) -> Any:
    """The content; of a long one its hash stands for its long parts, or for the whole of a text."""
    if len(json.dumps(content)) <= LIMIT:
        return content
    if isinstance(content, dict):
        long = {key for key, one in content.items() if len(json.dumps(one)) > LIMIT // 8}
        return {
            f"{key} sha256" if key in long else key: value_hash(one) if key in long else one
            for key, one in content.items()
        }
    return {"length": len(content), "sha256": value_hash(content)}
