"""The folder of shipped recipes, in an installed package and in a checkout alike."""

from __future__ import annotations

from pathlib import Path

from mmgraft.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent


def recipe_dir() -> Path:
    """Return the folder of the shipped recipes.

    The wheel carries them inside the package; in a checkout they stand beside it.

    Raises:
        UsageError: When neither is there, which means a damaged installation.
    """
    for folder in (_PACKAGE / "shipped", _PACKAGE.parents[1] / "recipes"):
        if folder.is_dir():
            return folder
    raise UsageError(f"no recipes beside {_PACKAGE}; reinstall mmgraft")
