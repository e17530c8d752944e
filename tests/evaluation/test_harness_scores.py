"""Intervals round the harness's numbers, on documents whose numbers are known beforehand."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lm_eval.api import metrics

from mmgraft.errors import UsageError
from mmgraft.evaluation.lm_eval.harness import Leaf, change_of, grouped, score_leaf
from mmgraft.evaluation.metrics.intervals import mean

Aggregate = Callable[[list[Any]], Any]


def leaf(name: str = "task", asked: str = "same", **columns: tuple[Aggregate, list[Any]]) -> Leaf:
    """A task with the number that the harness itself makes of its values."""
    return Leaf(
        name,
        "rows.jsonl",
        asked,
        max(len(values) for _, values in columns.values()),
        {key: aggregate(values) for key, (aggregate, values) in columns.items()},
        {key: values for key, (_, values) in columns.items()},
        {key: aggregate for key, (aggregate, _) in columns.items()},
    )


@pytest.fixture(autouse=True)
def _silent(request: pytest.FixtureRequest, said: list[str]) -> Iterator[None]:
    """Fail a test that does not look at what is said, and in which something is."""
    yield
    assert said == [] or "said" in inspect.signature(request.function).parameters


def test_a_mean_has_the_interval_of_every_other_mean() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    score = score_leaf(leaf(acc=(metrics.mean, values)))["acc"]
    assert score.model_dump() == pytest.approx(mean(values).model_dump())


def test_perplexities_are_sums_over_documents_not_means_of_them() -> None:
    """Two documents of 10 and 1 words: -20 nats and -1 nat are 21 nats in 11 words."""
    found = score_leaf(
        leaf(
            word_perplexity=(metrics.weighted_perplexity, [(-20.0, 10), (-1.0, 1)]),
            bits_per_byte=(metrics.bits_per_byte, [(-20.0, 10), (-1.0, 1)]),
            perplexity=(metrics.perplexity, [-2.0, -1.0]),
        )
    )
    assert found["word_perplexity"].value == pytest.approx(math.exp(21 / 11))
    # The extreme draws are one document twice.
    assert found["word_perplexity"].low == pytest.approx(math.exp(1))
    assert found["word_perplexity"].high == pytest.approx(math.exp(2))
    assert found["bits_per_byte"].low == pytest.approx(1 / math.log(2))
    assert found["bits_per_byte"].high == pytest.approx(2 / math.log(2))
    assert found["perplexity"].value == pytest.approx(math.exp(1.5))
    assert found["perplexity"].low == pytest.approx(math.exp(1))


def largest(values: list[float]) -> float:
    return max(values)


def test_any_other_metric_is_computed_anew_for_every_draw() -> None:
    values = [float(number) for number in range(40)]
    score = score_leaf(leaf(best=(largest, values)))["best"]
    assert score.value == 39
    assert 30 < score.low <= score.high == 39
    assert score.count == 40


def test_what_is_no_number_is_left_out_and_said(said: list[str]) -> None:
    one = leaf(
        acc=(metrics.mean, [1.0, 0.0]),
        odd=(lambda values: math.inf, [1.0, 2.0]),
        table=(lambda values: {"a": 1}, [1.0, 2.0]),
    )
    assert list(score_leaf(one)) == ["acc"]
    assert ["odd" in said[0], "table" in said[1], len(said)] == [True, True, 2]


def group(weighted: bool, metric: str = "acc", filters: list[str] | None = None) -> Any:
    wanted = SimpleNamespace(metric=metric, filter_list=filters, weight_by_size=weighted)
    return SimpleNamespace(name="group", aggregate_metric_list=[wanted])


@pytest.mark.parametrize("weighted", [True, False])
def test_a_groups_interval_is_of_its_own_kind_of_mean(weighted: bool) -> None:
    """A large task that is sure and a small one that is not: the small one counts as it counts."""
    small = [1.0, 0.0] * 10
    leaves = [
        leaf("large", acc=(metrics.mean, [1.0] * 180)),
        leaf("small", acc=(metrics.mean, small)),
    ]
    number = 190 / 200 if weighted else 0.75
    found = {"results": {"group": {"acc,none": number}}}
    score = grouped(group(weighted), leaves, found)["acc"]
    assert score.value == number
    assert score.count == 200
    # A standard error of 0.5 / sqrt(20) for the small task, at its weight of 1 half; and of the
    # pooled mean, sqrt(0.05 * 0.95 / 200).
    error = math.sqrt(0.95 * 0.05 / 200) if weighted else 0.5 / math.sqrt(20) / 2
    assert (score.high - score.low) / (2 * 1.96) == pytest.approx(error, rel=0.15)


def test_a_task_that_a_draw_misses_is_not_a_task_of_wrong_answers() -> None:
    leaves = [leaf(name, acc=(metrics.mean, [1.0] * size)) for name, size in (("a", 30), ("b", 1))]
    found = {"results": {"group": {"acc,none": 1.0}}}
    assert grouped(group(False), leaves, found)["acc"].low == 1


def test_a_group_of_what_is_no_mean_is_left_to_its_tasks(said: list[str]) -> None:
    one = leaf("one", ppl=(metrics.perplexity, [-1.0, -2.0]))
    found = {"results": {"group": {"ppl,none": 1.0}}}
    assert grouped(group(True, "ppl"), [one], found) == {}
    assert "see its tasks" in said[0]


def test_a_group_takes_the_filters_it_names() -> None:
    one = leaf("one", acc=(metrics.mean, [1.0]), **{"acc,strict": (metrics.mean, [0.0])})
    found = {"results": {"group": {"acc,none": 1.0, "acc,strict": 0.0}}}
    assert list(grouped(group(True, filters=["strict"]), [one], found)) == ["acc,strict"]
    assert list(grouped(group(True), [one], found)) == ["acc", "acc,strict"]


def test_change_pairs_the_documents() -> None:
    before = leaf(acc=(metrics.mean, [1.0, 0.0] * 50), best=(largest, [1.0] * 100))
    after = leaf(acc=(metrics.mean, [1.0, 0.0] * 49 + [0.0, 0.0]), best=(largest, [1.0] * 100))
    change = change_of([after], [before])
    assert list(change) == ["acc"]  # a largest value has no pairs to draw
    assert change["acc"].value == pytest.approx(-0.01)
    assert change["acc"].high == 0
    assert change["acc"].low > -0.05  # unpaired, it would reach past -0.1
    pooled = change_of([after, after], [before, before], group(False))["acc"]
    assert pooled.value == pytest.approx(-0.01)


def test_other_questions_have_no_change() -> None:
    one, two = (leaf(asked=asked, acc=(metrics.mean, [1.0])) for asked in ("this", "that"))
    with pytest.raises(UsageError, match="different prompts"):
        change_of([one], [two])


def test_numpy_values_are_plain_numbers_in_a_report() -> None:
    score = score_leaf(leaf(acc=(np.mean, [np.float32(1), np.float32(0)])))["acc"]
    assert type(score.value) is float
