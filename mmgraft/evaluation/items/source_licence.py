"""The licence of a set's images, as ``mmgraft data prepare`` has noted it beside them."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmgraft.data.chat.turns import images_of_all
from mmgraft.data.images import is_data_uri, path_of
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.item import Item
from mmgraft.textfiles import read_json

#: Licences under which images may go along with a report; those that are known are strings.
FREE = frozenset({"MIT", "CC0", "CC0-1.0"})

SOURCES = "*.source.json"
_LEVELS = 4  # folders above an image that are looked into


def stated_licences(file: Path, items: Iterable[Item]) -> set[str | None]:
    """Return the licences of a file of items and of their images; None is one that nothing states.

    An image's is that of the nearest folder above it that has source files. The file's own must
    name the file with its SHA-256: a file of one's own, put beside a packaged set, has none.

    Args:
        file: Of the items.
        items: Those whose images are to be shown.
    """
    found = _of(_near(file), file)
    folders = set()
    for item in items:
        for image in images_of_all(item.messages):
            if isinstance(image, str) and not is_data_uri(image):
                folders.add(Path(path_of(image)).resolve().parent)
            else:
                found.add(None)
    for folder in folders:
        found |= _of(_near(folder / "image"))
    return found


def _near(path: Path) -> list[dict[str, Any]]:
    """Return what the nearest source files above a path say; all of that folder."""
    for folder in list(path.resolve().parents)[:_LEVELS]:
        files = sorted(folder.glob(SOURCES))
        if files:
            return [_read(file) for file in files]
    return []


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file, "")
    except UsageError:
        return {}


def _of(sources: Sequence[dict[str, Any]], file: Path | None = None) -> set[str | None]:
    """Return their licences; None where there is none, or none of them names the file."""
    found: set[str | None] = {source.get("licence") for source in sources}
    if file is not None and not file.is_file():  # shards, or a set of the Hub
        found.add(None)
    elif file is not None:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        sums = [source.get("sha256") for source in sources]
        if not any(isinstance(one, dict) and one.get(file.name) == sha256 for one in sums):
            found.add(None)
    return found or {None}
