"""Writing of files that are either the old one or the new one, whole, whatever happens."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmgraft.errors import MMGraftError

_BUILDING, _READY, _MOVES = ".building", ".ready", "moves.json"


def atomic_write(path: Path | str, writer: Callable[[Path], object]) -> None:
    """Write a file beside its target, sync it, and put it there in one step.

    Args:
        path: Where the file is to stand; what stands there stays until the new one is on disk.
        writer: Called with the path of a temporary file in the same folder, which it fills.

    Raises:
        MMGraftError: The disk is full or cannot be written to; ``path`` is as it was.
    """
    path = Path(path)
    with _reported(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        try:
            os.close(handle)
            writer(temporary)
            temporary.chmod(_mode_of(path))  # afterwards: a writer may put a file of its own there
            _sync(temporary)
            temporary.replace(path)
        except BaseException:  # a Ctrl-C leaves no half file behind either
            temporary.unlink(missing_ok=True)
            raise
    _sync(path.parent)


def atomic_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file in one step. See ``atomic_write``."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def atomic_bytes(path: Path | str, data: bytes) -> None:
    """Write bytes to a file in one step. See ``atomic_write``."""
    atomic_write(path, lambda temporary: temporary.write_bytes(data))


def atomic_json(path: Path | str, data: Any) -> None:
    """Write a JSON file in one step. See ``atomic_write``."""
    atomic_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def atomic_folder(path: Path | str, writer: Callable[[Path], None]) -> None:
    """Write a folder beside its target and put it there when it is whole.

    Args:
        path: Where the folder is to stand; one that stands there stays until the new one is whole.
        writer: Called with the path of an empty temporary folder, which it fills.

    Raises:
        MMGraftError: The disk is full or cannot be written to; ``path`` is as it was.
    """
    path = Path(path)
    old = path.with_name(f".{path.name}.old")
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():
            old.replace(path)  # an earlier run was killed between the two renamings
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            writer(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(_usual_mode())
                    _sync(file)
            temporary.chmod(0o777 & ~_mask())
            _sync(temporary)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.replace(old)
            temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not path.exists():
                old.replace(path)
            raise
    shutil.rmtree(old, ignore_errors=True)
    _sync(path.parent)


def replace_together(
    folder: Path | str, writers: Mapping[str, Callable[[Path], object]], gone: Collection[str] = ()
) -> None:
    """Replace files and folders that belong together: all are the old ones, or all the new ones.

    They are written into a hidden folder, whose renaming makes them the ones that count. A kill
    after that loses nothing: ``complete``, called by who reads, moves what was not yet moved.

    Args:
        folder: Where they stand; made where it is missing.
        writers: Called in order with a path each, where they write a file or make a folder. They
            are moved in this order, too.
        gone: Names that are removed together with what is replaced.

    Raises:
        MMGraftError: The disk is full or cannot be written to; all is as it was.
    """
    folder = Path(folder)
    building, ready = folder / _BUILDING, folder / _READY
    made = not folder.exists()
    with _reported(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            complete(folder)
            _remove(building)  # of a save that was killed
            building.mkdir()
            for name, writer in writers.items():
                fresh = building / name
                writer(fresh)
                if fresh.is_file():
                    fresh.chmod(_mode_of(folder / name))
                for file in (path for path in fresh.rglob("*") if path.is_file()):
                    file.chmod(_usual_mode())
            atomic_json(building / _MOVES, {"put": list(writers), "gone": sorted(gone)})
            for path in (*building.rglob("*"), building):
                _sync(path)
            building.rename(ready)
            _sync(folder)
        except BaseException:
            _remove(building)
            if made:
                with suppress(OSError):
                    folder.rmdir()
            raise
    complete(folder)


def complete(folder: Path | str) -> None:
    """Finish what a killed ``replace_together`` had begun to move; mostly there is nothing to do.

    Raises:
        MMGraftError: It cannot be finished, for want of rights.
    """
    ready = Path(folder) / _READY
    if not ready.is_dir():
        return
    try:
        if (ready / _MOVES).is_file():  # else all is moved, and the folder was being removed
            moves = json.loads((ready / _MOVES).read_text(encoding="utf-8"))
            for name in moves["put"]:
                _move(ready / name, Path(folder) / name)
            for name in moves["gone"]:
                _remove(Path(folder) / name)
            _sync(Path(folder))
        _remove(ready)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not ready.exists():
            return  # another process has finished it at the same time
        raise MMGraftError(
            f"a save into {folder} was cut short and cannot be finished ({error}); get the right "
            "to write there and run the command again"
        ) from error


def _move(fresh: Path, path: Path) -> None:
    """Put a fresh file or folder in its place, unless that was done already."""
    if fresh.is_dir() and path.exists():  # a folder cannot be renamed over another one
        old = fresh.with_name(f"{fresh.name}.old")
        _remove(old)
        path.replace(old)
    if fresh.exists():
        fresh.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """While the block lasts, raise an error that a user can act on where a write fails."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise MMGraftError(
            f"could not write {path} ({error}); what stood there is as it was. Make room, or "
            "choose another folder, and run the command again"
        ) from error


def _mode_of(path: Path) -> int:
    """Return the mode of the file to be replaced, or the one a new file gets."""
    return path.stat().st_mode & 0o777 if path.exists() else _usual_mode()


def _usual_mode() -> int:
    """Return the mode of a new file; safetensors lets nobody but the owner read its own."""
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


def free_name(path: Path, mark: str = ".stale-") -> Path:
    """Return a name beside a file that is put aside: ``x.stale-1.jsonl`` of ``x.jsonl``."""
    names = (path.with_name(f"{path.stem}{mark}{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not name.exists())
