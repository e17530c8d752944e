"""Results of evaluation in a run: one JSON file a section, with a schema. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mmgraft.atomic import atomic_json
from mmgraft.errors import UsageError
from mmgraft.strict import MeasuredModel, about
from mmgraft.textfiles import read_json

SCHEMA_VERSION = 1
FOLDER = "results"
Section = Literal["training", "text", "vision", "iit", "laws"]
SECTIONS: tuple[Section, ...] = ("training", "text", "vision", "iit", "laws")


class Score(MeasuredModel):
    """A number and its 95 % bootstrap interval; see ``evaluation.metrics.intervals``."""

    value: float
    low: float
    high: float
    count: int
    groups: int | None = about("groups resampled for the interval; of one there is none")

    def __str__(self) -> str:
        """``0.823 (0.800 to 0.846)``."""
        ends = f"{self.low:.3f} to {self.high:.3f}" if self.groups != 1 else "one group"
        return f"{self.value:.3f} ({ends})"

    @property
    def resolved(self) -> bool:
        """For a difference: whether the interval excludes zero, and is of several groups."""
        return self.groups != 1 and (self.low > 0 or self.high < 0)


class SetResult(MeasuredModel):
    """The scores of one set.

    A score's name is the metric's, in the field's terms: ``accuracy``, ``accuracy_per_token``,
    ``perplexity``, ``kl_to_base``, ``cider``, ``precision_at_0.5``, ``mean_iou``, ``precision``,
    ``recall``, ``f1``, ``yes_ratio``.
    """

    name: str
    metric: str
    main: str = Field(description="name of the score that a table shows")
    file: str = Field(description="name of the file of items")
    sha256: str = Field(description="SHA-256 of that file")
    items: int
    scores: dict[str, Score]
    base: dict[str, Score] = about("scores of the untouched base on the same items", dict)
    change: dict[str, Score] = about("paired difference, graft minus base", dict)
    blind: dict[str, dict[str, Score]] = about("scores of `prior` and `no_image`", dict)
    kinds: dict[str, dict[str, Score]] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    predictions: str | None = about("jsonl, relative to the run")
    sheet: str | None = about(
        "PNG of some boxes, relative to the run; in results/sheets it is not pushed",
        pattern=r"^results/(boxes-|sheets/)[A-Za-z0-9][A-Za-z0-9_.-]*\.png$",
    )
    seconds: float = 0.0


class Results(MeasuredModel):
    """One section of a run's results."""

    schema_version: int = SCHEMA_VERSION
    section: Section
    mmgraft_version: str
    versions: dict[str, str] = Field(default_factory=dict)
    graft: dict[str, str] = about("method, workflow, base, vision, sha256 of the graft", dict)
    identity: dict[str, Any] | None = about("text section: the proof that text is the base's")
    sets: list[SetResult] = Field(default_factory=list)
    details: dict[str, Any] = Field(default_factory=dict)


def results_file(run: Path, section: Section) -> Path:
    """Return where a section lies."""
    return run / FOLDER / f"{section}.json"


def write_results(run: Path, results: Results) -> Path:
    """Write a section in one step: it is whole or not there."""
    path = results_file(run, results.section)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_json(path, results.model_dump(mode="json"))
    return path


def read_results(run: Path, section: Section) -> Results | None:
    """Read a section, or None where it was never measured.

    Raises:
        UsageError: The file is damaged, or of a newer schema.
    """
    path = results_file(run, section)
    if not path.is_file():
        return None
    data = read_json(path, "remove it and measure again")
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{path} has schema version {version}, this mmgraft reads {SCHEMA_VERSION}; "
            "measure again, or use the mmgraft that wrote it"
        )
    return Results.parse(data, str(path))


def measured(run: Path) -> list[Results]:
    """Read the sections that a run has, in their order.

    Raises:
        UsageError: One is damaged or of a newer schema.
    """
    found = (read_results(run, section) for section in SECTIONS)
    return [one for one in found if one is not None]
