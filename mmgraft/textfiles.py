"""Text and JSON files that a user brings: read, or refused by name."""

import codecs
import json
from pathlib import Path
from typing import Any

from mmgraft.errors import UsageError

_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """Read a whole text file; a mark of UTF-8 at its beginning is left out.

    Raises:
        UsageError: It is not there, may not be read, is no file, or is not UTF-8 text.
    """
    try:
        data = Path(path).read_bytes()
        if data.startswith(_WIDE) or b"\0" in data:
            raise UnicodeDecodeError("utf-8", data, 0, 1, "it looks like UTF-16")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}); convert it") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check it") from error


def read_json(path: Path, todo: str) -> Any:
    """Read a JSON file that must hold an object.

    Args:
        path: The file.
        todo: What to do about a damaged one, for the message.

    Raises:
        UsageError: As ``read_text``, or it holds something else.
    """
    try:
        data = json.loads(read_text(path))
        if not isinstance(data, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged (corrupt JSON: {error}); {todo}") from None
    return data


def weight_files(folder: Path, stem: str, suffix: str) -> list[Path]:
    """Return the one file, else the shards that an index names, as transformers reads them.

    Args:
        folder: A model's or a graft's.
        stem: How the files' names begin: ``model``, ``pytorch_model`` or ``graft``.
        suffix: Such as ``.safetensors``.

    Raises:
        UsageError: The index is broken, or names a file that is not there or lies elsewhere.
    """
    single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    shards = read_json(index, "fetch it again").get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UsageError(f"{index} is damaged (no weight_map); fetch it again")
    names = sorted(set(map(str, shards.values())))
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    missing = [name for name in names if not (folder / name).is_file()]
    if outside or missing:
        raise UsageError(f"{folder} lacks {', '.join(outside or missing)}; fetch it again")
    return [folder / name for name in names]
