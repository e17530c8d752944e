"""Text and JSON files that a user brings: read, or refused by name."""

from __future__ import annotations

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
