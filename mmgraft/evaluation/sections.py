"""A run's sections grow set by set: what was measured of the same graft stays. Free of torch."""

from __future__ import annotations

from pathlib import Path

from mmgraft.evaluation.results import Results, read_results, write_results


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
    fresh = {one.name: one for one in results.sets}
    sets = [fresh.pop(one.name, one) for one in before.sets]
    merged = results.model_copy(
        update={
            "sets": [*sets, *fresh.values()],
            "identity": results.identity or before.identity,
            "versions": {**before.versions, **results.versions},
            "details": {**before.details, **results.details},
        }
    )
    return write_results(run, merged)
