"""Files that are either the old one or the new one, whole, whatever happens while writing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmgraft.errors import MMGraftError


def atomic_write(path: Path | str, writer: Callable[[Path], None]) -> None:
    """Writes a file beside its place, syncs it, and puts it there in one step.

    Args:
        path: where the file is to stand; what stands there stays until the new one is on disk.
        writer: called with the path of a temporary file in the same folder, which it fills.

    Raises:
        MMGraftError: the disk is full or cannot be written to; `path` is as it was.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise _failed(path, error) from error
    temporary = Path(name)
    try:
        os.close(handle)
        writer(temporary)
        temporary.chmod(_mode_of(path))  # afterwards: a writer may put a file of its own there
        _sync(temporary)
        temporary.replace(path)
    except BaseException as error:  # a Ctrl-C leaves no half file behind either
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise _failed(path, error) from error
        raise
    _sync(path.parent)


def atomic_text(path: Path | str, text: str) -> None:
    """Writes a UTF-8 text file in one step. See `atomic_write`."""
    atomic_write(path, lambda temporary: _write_text(temporary, text))


def atomic_json(path: Path | str, data: Any) -> None:
    """Writes a JSON file in one step. See `atomic_write`."""
    atomic_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def atomic_folder(path: Path | str, writer: Callable[[Path], None]) -> None:
    """Writes a folder beside its place and puts it there when it is whole.

    Args:
        path: where the folder is to stand; one that stands there stays until the new one is whole.
        writer: called with the path of an empty temporary folder, which it fills.

    Raises:
        MMGraftError: the disk is full or cannot be written to; `path` is as it was.
    """
    path = Path(path)
    old = path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():
            old.replace(path)  # an earlier run was killed between the two renamings
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise _failed(path, error) from error
    try:
        writer(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        temporary.chmod(0o777 & ~_mask())
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.replace(old)
        temporary.replace(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            old.replace(path)
        if isinstance(error, OSError | SafetensorError):
            raise _failed(path, error) from error
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sync(path.parent)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _failed(path: Path, error: Exception) -> MMGraftError:
    return MMGraftError(
        f"could not write {path} ({error}); what stood there is as it was. Make room, or choose "
        "another folder, and run the command again"
    )


def _mode_of(path: Path) -> int:
    """Gives the mode of the file to be replaced, or the one a new file gets."""
    if path.exists():
        return path.stat().st_mode & 0o777
    return 0o666 & ~_mask()


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
