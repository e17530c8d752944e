"""Store of the loopback Hub: repositories, their commits, and the bytes of their files."""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import yaml

LFS_SUFFIXES = frozenset(
    [
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".onnx",
        ".gguf",
        ".h5",
        ".npz",
        ".model",
        ".parquet",
        ".png",
    ]
)
LFS_ABOVE = 10 * 2**20

_counter = itertools.count()


class Blob:
    """The bytes of one file, in memory or on disk, hashed when first asked for."""

    def __init__(self, source: bytes | Path) -> None:
        self.source = source
        self.size = len(source) if isinstance(source, bytes) else source.stat().st_size

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    def copy_to(self, out: BinaryIO, start: int, stop: int) -> None:
        """Write the bytes from `start` up to `stop`."""
        if isinstance(self.source, bytes):
            out.write(self.source[start:stop])
            return
        with self.source.open("rb") as file:
            file.seek(start)
            while start < stop and (piece := file.read(min(2**20, stop - start))):
                out.write(piece)
                start += len(piece)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % self.size + self.read()).hexdigest()

    def is_lfs(self, name: str) -> bool:
        return is_lfs(name, self.size)

    def etag(self, name: str) -> str:
        """SHA-256 for large files and git's id for the others, as the Hub has it."""
        return self.sha256 if self.is_lfs(name) else self.git_oid


def is_lfs(name: str, size: int) -> bool:
    """Tell whether the Hub would keep such a file in large storage. Empty files never are."""
    return size > 0 and (size > LFS_ABOVE or Path(name).suffix in LFS_SUFFIXES)


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    title: str
    files: dict[str, Blob]
    parent: str | None


@dataclass
class Repo:
    """A model repository with one branch, `main`, and every commit that it ever pointed at."""

    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    sha: str = ""
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def head(self) -> Commit:
        return self.commits[self.sha]

    @property
    def names(self) -> list[str]:
        return sorted(self.head.files)

    def read(self, name: str) -> bytes:
        """The bytes of `name` on `main`."""
        return self.head.files[name].read()

    def at(self, revision: str) -> Commit | None:
        return self.head if revision in ("main", "HEAD") else self.commits.get(revision)

    def commit(self, title: str, changes: dict[str, Blob | None]) -> str:
        """Move `main` one commit on. A file whose blob is None is deleted."""
        with self.lock:
            files = {**(self.head.files if self.sha else {}), **changes}
            kept = {name: blob for name, blob in files.items() if blob is not None}
            seed = f"{self.id} {self.sha} {title} {sorted(kept)} {next(_counter)}"
            oid = hashlib.sha1(seed.encode()).hexdigest()
            self.commits[oid] = Commit(oid, title, kept, self.sha or None)
            self.sha = oid
            return oid


def file_entry(name: str, blob: Blob) -> dict[str, Any]:
    """Return what `tree` and `paths-info` tell about a file."""
    entry: dict[str, Any] = {"type": "file", "path": name, "size": blob.size, "oid": blob.git_oid}
    if blob.is_lfs(name):
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
    return entry


def tree(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Files (and folders) of `commit` below `folder`; empty when there is no such folder."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, blob in sorted(commit.files.items()):
        if not name.startswith(prefix):
            continue
        parts = name[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            path = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(path.encode()).hexdigest()
            entries[path] = {"type": "directory", "path": path, "size": 0, "oid": oid}
        if recursive or len(parts) == 1:
            entries[name] = file_entry(name, blob)
    return list(entries.values())


def front_matter(commit: Commit) -> dict[str, Any]:
    """The metadata of a commit's card; empty when it has none that can be read."""
    readme = commit.files.get("README.md")
    if readme is None:
        return {}
    try:
        return parse_front_matter(readme.read().decode())
    except (yaml.YAMLError, ValueError):
        return {}


def parse_front_matter(text: str) -> dict[str, Any]:
    """The metadata at the start of a card. Raises `ValueError` or a YAML error for bad ones."""
    found = re.match(r"---\n(.*?)\n---(\n|$)", text.replace("\r\n", "\n"), re.DOTALL)
    data = yaml.safe_load(found[1]) if found else {}
    if not isinstance(data, dict):
        raise ValueError("the front matter is no mapping")
    return data
