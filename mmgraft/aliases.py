"""Short names of models, read from ``aliases.toml``."""

import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmgraft.errors import UsageError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def resolve_alias(name: str) -> str:
    """Return the Hub id or folder that ``name`` means.

    A path, a Hub id (anything with a ``/``) and a folder that exists are what they are; anything
    else must be an alias, in upper or lower case.

    Raises:
        UsageError: For a word that is neither, with the nearest alias.
    """
    if not name.strip():
        raise UsageError("the model's name is empty; give an alias, a Hub id or a folder")
    if "/" in name or "\\" in name or Path(name).expanduser().is_dir():
        return name
    known = aliases()
    if name.lower() in known:
        return known[name.lower()]
    guess = nearest(name, known)
    hint = f"did you mean {guess!r}? Otherwise give" if guess else "give"
    raise UsageError(
        f"unknown model {name!r}: it is no folder here and no alias; {hint} a Hub id such as "
        "Qwen/Qwen2-7B-Instruct, or a folder"
    )


def default_tower() -> str:
    """Return the vision tower of a graft that names none."""
    return _data()["defaults"]["tower"]


def aliases() -> dict[str, str]:
    """Return every alias and the Hub id that it stands for."""
    return _data()["models"]


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(files("mmgraft").joinpath("aliases.toml").read_text(encoding="utf-8"))
