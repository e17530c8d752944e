"""Numbers of lm-evaluation-harness with intervals, from what it says of every document."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmgraft.errors import UsageError
from mmgraft.evaluation.metrics.intervals import Statistic, estimate, interval_of, paired, ratio
from mmgraft.progress import say
from mmgraft.runs.results import Score

RESAMPLES = 200
"""Samples for metrics that are no function of sums (BLEU, F1), each computed anew."""


@dataclass(frozen=True)
class Leaf:
    """One task's numbers.

    Attributes:
        name: Of the task.
        file: Name of its data: a data set's id, or the names of local files.
        prompts: SHA-256 of all that was evaluated: prompts, options, settings and pixels.
        items: Documents.
        numbers: The harness's, by the metric's name (and the filter's, after a comma).
        values: One a document, by the same names; what their kind is the metric knows.
        aggregates: What turns values into the number.
    """

    name: str
    file: str
    prompts: str
    items: int
    numbers: dict[str, Any]
    values: dict[str, list[Any]]
    aggregates: dict[str, Callable[[list[Any]], Any]]

    @classmethod
    def of(cls, task: Any, found: dict[str, Any]) -> Leaf:
        """Return what ``simple_evaluate`` found of a task."""
        from lm_eval.api.metrics import mean
        from lm_eval.api.model import hash_args

        name = task.task_name
        samples = found["samples"][name]
        values: dict[str, list[Any]] = {}
        digest = hashlib.sha256()
        for sample in samples:
            for metric in sample["metrics"]:
                values.setdefault(_key(metric, sample["filter"]), []).append(sample[metric])
            for arguments in sample["arguments"]:
                digest.update(hash_args(task.OUTPUT_TYPE, arguments).encode())
        numbers: dict[str, Any] = {}
        for key, number in found["results"][name].items():
            metric, comma, filtered = key.partition(",")
            if comma and _key(metric, filtered) in values:
                numbers[_key(metric, filtered)] = number
        known = task.aggregation()
        aggregates = {key: known.get(key.partition(",")[0], mean) for key in values}
        items = len({sample["doc_id"] for sample in samples})
        return cls(name, _file(task), digest.hexdigest(), items, numbers, values, aggregates)


def score_leaf(leaf: Leaf) -> dict[str, Score]:
    """Return a task's numbers with their intervals, those that are finite."""
    scores: dict[str, Score] = {}
    for key, number in leaf.numbers.items():
        if not _is_number(number):
            say(f"{leaf.name}: {key} is {number}, not a number, and left out")
            continue
        sums = _sums(leaf, key)
        if sums:
            scores[key] = _with_value(number, *sums)
        elif (ends := _resampled(leaf, key)) is not None:
            count, (low, high) = len(leaf.values[key]), ends
            scores[key] = Score(value=float(number), low=low, high=high, count=count, groups=count)
        else:
            say(f"{leaf.name}: {key} has no interval and is left out")
    return scores


def grouped(group: Any, leaves: Sequence[Leaf], found: dict[str, Any]) -> dict[str, Score]:
    """Return a group's numbers: means over its tasks, weighted where it says so."""
    scores: dict[str, Score] = {}
    for key, weighted in _group_keys(group, leaves):
        metric, comma, filtered = key.partition(",")
        number = found["results"][group.name].get(f"{metric},{filtered if comma else 'none'}")
        sums = _group_sums(leaves, key, weighted)
        if sums is None or not _is_number(number):
            say(f"{group.name}: {key} is no mean over documents; see its tasks")
            continue
        scores[key] = _with_value(number, *sums)
    return scores


def change_of(after: Sequence[Leaf], before: Sequence[Leaf], group: Any = None) -> dict[str, Score]:
    """Return paired differences, after minus before, of the metrics that are functions of sums.

    Raises:
        UsageError: The two did not get the same prompts.
    """
    if [leaf.prompts for leaf in after] != [leaf.prompts for leaf in before]:
        raise UsageError(
            f"task {after[0].name}: the graft and its base got different prompts; run it again"
        )
    changes: dict[str, Score] = {}
    keys = _group_keys(group, after) if group is not None else [(k, True) for k in after[0].numbers]
    for key, weighted in keys:
        if group is not None:
            one, two = (_group_sums(leaves, key, weighted) for leaves in (after, before))
        else:
            one, two = _sums(after[0], key), _sums(before[0], key)
        if one is not None and two is not None:
            changes[key] = paired(one[0], two[0], one[1])
    return changes


# -- steps --------------------------------------------------------------------------------------


def _with_value(number: Any, columns: np.ndarray, statistic: Statistic) -> Score:
    """Return the harness's own number with our interval."""
    return estimate(columns, statistic).model_copy(update={"value": float(number)})


def _key(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric},{filtered}"


def _file(task: Any) -> str:
    files = (task.get_config("dataset_kwargs") or {}).get("data_files")
    if files:
        listed = files.values() if isinstance(files, dict) else [files]
        flat = [one for some in listed for one in ([some] if isinstance(some, str) else some)]
        return ", ".join(Path(one).name for one in flat)
    path = str(task.get_config("dataset_path") or task.task_name)
    path = Path(path).name if Path(path).exists() else path
    name = task.get_config("dataset_name")
    return f"{path}:{name}" if name else path


def _is_number(number: Any) -> bool:
    try:
        return math.isfinite(float(number))
    except (TypeError, ValueError):
        return False


def _sums(leaf: Leaf, key: str) -> tuple[np.ndarray, Statistic] | None:
    """Return columns and statistic of a metric that is a function of sums; None where it is not."""
    from lm_eval.api import metrics

    statistics: dict[Any, tuple[bool, Statistic]] = {
        metrics.mean: (False, ratio),
        metrics.perplexity: (False, lambda sums: np.exp(-ratio(sums))),
        metrics.weighted_perplexity: (True, lambda sums: np.exp(-ratio(sums))),
        metrics.bits_per_byte: (True, lambda sums: -ratio(sums) / math.log(2)),
    }
    weighted, statistic = statistics.get(leaf.aggregates[key], (False, None))
    if statistic is None:
        return None
    try:
        table = np.asarray(leaf.values[key], dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if table.shape != ((len(table), 2) if weighted else (len(table),)):
        return None
    return (table if weighted else np.stack([table, np.ones_like(table)], axis=-1)), statistic


def _group_keys(group: Any, leaves: Sequence[Leaf]) -> list[tuple[str, bool]]:
    """Return the metrics a group puts together, and whether tasks count by their documents."""
    keys: list[tuple[str, bool]] = []
    for wanted in group.aggregate_metric_list or ():
        for key in dict.fromkeys(key for leaf in leaves for key in leaf.numbers):
            metric, _, filtered = key.partition(",")
            listed = wanted.filter_list is None or (filtered or "none") in wanted.filter_list
            if metric == wanted.metric and listed:
                keys.append((key, bool(wanted.weight_by_size)))
    return keys


def _group_sums(
    leaves: Sequence[Leaf], key: str, weighted: bool
) -> tuple[np.ndarray, Statistic] | None:
    """Return two columns a task ``(documents, 2 tasks)``, and the mean over all or over tasks."""
    from lm_eval.api.metrics import mean

    tables = []
    for leaf in leaves:
        sums = _sums(leaf, key) if key in leaf.numbers else None
        if sums is None or leaf.aggregates[key] is not mean:
            return None
        tables.append(sums[0])
    if weighted:
        return np.concatenate(tables), ratio
    count = len(tables)
    wide = np.zeros((sum(map(len, tables)), 2 * count))
    start = 0
    for number, table in enumerate(tables):
        wide[start : start + len(table), 2 * number : 2 * number + 2] = table
        start += len(table)

    def mean_of_means(sums: np.ndarray) -> np.ndarray:
        pairs = sums.reshape(*sums.shape[:-1], count, 2)
        there = pairs[..., 1] > 0  # a small task may be missing from a sample
        return (ratio(pairs) * there).sum(-1) / there.sum(-1)

    return wide, mean_of_means


def _resampled(leaf: Leaf, key: str) -> tuple[float, float] | None:
    """Return the interval of any metric, by computing it for samples of the documents."""
    values, aggregate = leaf.values[key], leaf.aggregates[key]
    rng = np.random.default_rng(0)
    found: list[float] = []
    for _ in range(RESAMPLES):
        sample = [values[at] for at in rng.integers(len(values), size=len(values))]
        try:
            number = float(aggregate(sample))
        except (ArithmeticError, TypeError, ValueError):
            continue  # a sample that the metric is not made for, such as one of a single class
        if math.isfinite(number):
            found.append(number)
    return interval_of(found) if found else None
