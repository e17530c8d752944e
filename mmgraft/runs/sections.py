"""A run's sections grow set by set: what was measured of the same graft stays. Free of torch."""

from __future__ import annotations

from pathlib import Path

from mmgraft.atomic import free_name
from mmgraft.runs.results import (
    FOLDER,
    SECTIONS,
    Results,
    SetResult,
    read_results,
    results_file,
    write_results,
)


def put_aside(run: Path, results: Results) -> list[Path]:
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


def save_sets(run: Path, results: Results) -> Path:
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


def _called(one: SetResult) -> tuple[str, bool]:
    """Name a set; a task of lm-evaluation-harness may be called like a set of the recipe."""
    return one.name, "harness" in one.settings
