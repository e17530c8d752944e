"""Results of evaluation in a run: one JSON file a section, with a schema. Free of torch.

A run's sections grow set by set: what was measured of the same graft stays.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mmgraft.atomic import atomic_json, free_name
from mmgraft.errors import UsageError
from mmgraft.strict import MeasuredModel, about
from mmgraft.textfiles import read_json


def put_aside(run: Path, results: "Results") -> list[Path]:
    """Rename the sections that were measured of another graft, such as before more training.

    They would stand in the report and in the model card as if they were of this one.

    Args:
        run: Its folder.
        results: What was measured just now.

    Returns:
        Their new names, ``text.stale-1.old``, under which they are not pushed.

    Raises:
        UsageError: A section is damaged.
    """
    now = results.graft.get("sha256")
    moved = []
    for section in SECTIONS:
        found = read_results(run, section)
        if found is not None and now and found.graft.get("sha256", now) != now:
            moved.append(_aside(results_file(run, section)))
    return moved


def put_all_aside(run: Path) -> list[Path]:
    """Rename every section of a run whose graft is about to be trained; its report goes.

    Returns:
        Their new names, under which they are not pushed.
    """
    for ending in ("json", "md", "html"):
        (run / FOLDER / f"report.{ending}").unlink(missing_ok=True)
    there = [results_file(run, section) for section in SECTIONS]
    return [_aside(path) for path in there if path.is_file()]


def _aside(path: Path) -> Path:
    return path.replace(free_name(path.with_suffix(".old")))


def save_sets(run: Path, results: "Results") -> Path:
    """Write a section, with those sets of an earlier one that were not measured anew.

    Sets of another graft (other weights, other settings) are not kept.

    Returns:
        The file.

    Raises:
        UsageError: The earlier section is damaged.
        MMGraftError: The disk is full; the earlier section stays.
    """
    before = read_results(run, results.section)
    if before is None or before.graft.get("sha256") != results.graft.get("sha256"):
        return write_results(run, results)
    fresh = {_called(one): one for one in results.sets}
    sets = [fresh.pop(_called(one), one) for one in before.sets]
    merged = results.model_copy(
        update={
            "sets": [*sets, *fresh.values()],
            "identity": results.identity or before.identity,
            "versions": {**before.versions, **results.versions},
            "details": {**before.details, **results.details},
        }
    )
    return write_results(run, merged)


def _called(one: "SetResult") -> tuple[str, bool]:
    """Name a set; a task of lm-evaluation-harness may be called like a set of the recipe."""
    return one.name, "harness" in one.settings


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
