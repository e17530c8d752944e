"""Find the graft that a command is about when no folder was named."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from mmgraft.errors import UsageError
from mmgraft.progress import say

#: The file that makes a folder a graft.
GRAFT_CONFIG = "graft_config.json"

_HOW_TO_MAKE_ONE = "make one with `mmgraft graft BASE --method iaa --layers 22,24`"
_DEEPEST = 3
_SKIPPED = frozenset(["checkpoints", "base", "node_modules", "__pycache__", "site-packages"])


def find_run(path: str | Path | None = None) -> Path:
    """Find the folder of the graft that is meant.

    Args:
        path: What the user named. None takes the current folder if it is a graft, else the only
            graft up to three folders below it.

    Raises:
        UsageError: When ``path`` is no graft; when there is no graft, or more than one, to take.
    """
    if path is not None:
        return _named(Path(path).expanduser())
    here = Path.cwd()
    if is_graft(here):
        say(f"taking the graft in the current folder, {here.name}")
        return here
    found = sorted(grafts_below(here))
    if not found:
        raise UsageError(
            f"there is no graft in {here} or below it; {_HOW_TO_MAKE_ONE}, or name its folder"
        )
    names = [str(one.relative_to(here)) for one in found]
    if len(found) > 1:
        listed = "\n".join(f"  {name}" for name in names)
        raise UsageError(f"there are {len(found)} grafts below {here}; name one of:\n{listed}")
    say(f"taking the only graft here, {names[0]}")
    return found[0]


def is_graft(folder: Path) -> bool:
    """Tell whether a folder holds a graft."""
    return (folder / GRAFT_CONFIG).is_file()


def grafts_below(folder: Path) -> Iterator[Path]:
    """Find every graft below a folder, but those within another graft or a checkpoint."""
    queue = deque([(folder, 0)])
    while queue:
        current, depth = queue.popleft()
        for child in _folders(current):
            if is_graft(child):
                yield child
            elif depth + 1 < _DEEPEST:
                queue.append((child, depth + 1))


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []  # a folder that may not be read holds nothing for us
    return [folder / name for name in names if not name.startswith(".") and name not in _SKIPPED]


def _named(path: Path) -> Path:
    if path.name == GRAFT_CONFIG and path.is_file():
        return path.parent
    if not path.exists():
        raise UsageError(f"there is no folder {path}; name the folder of a graft")
    if not path.is_dir():
        raise UsageError(f"{path} is a file; name the folder of a graft")
    if is_graft(path):
        return path
    inside = [f"{path / one.relative_to(path)}" for one in sorted(grafts_below(path))]
    if inside:
        listed = "\n".join(f"  {name}" for name in inside)
        raise UsageError(f"{path} is no graft, but holds {len(inside)}; name one of:\n{listed}")
    raise UsageError(f"{path} is no graft: it has no {GRAFT_CONFIG}; {_HOW_TO_MAKE_ONE}")
