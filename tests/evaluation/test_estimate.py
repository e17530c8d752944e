"""Intervals: against the binomial's, grouped, paired, and of statistics that are no means."""

from __future__ import annotations

import numpy as np
import pytest

from mmgraft.errors import UsageError
from mmgraft.evaluation.metrics.intervals import estimate, mean, paired


def test_a_mean_lies_in_its_interval() -> None:
    found = mean([True] * 75 + [False] * 25)
    assert found.value == 0.75
    assert found.count == 100
    # Binomial: sqrt(0.75 * 0.25 / 100) = 0.043; 1.96 of them on either side.
    assert found.low == pytest.approx(0.75 - 0.085, abs=0.02)
    assert found.high == pytest.approx(0.75 + 0.085, abs=0.02)
    assert str(found).startswith("0.750 (0.6")


def test_items_of_one_group_are_drawn_together() -> None:
    """Ten pictures with ten equal answers each are ten draws, not a hundred."""
    right = [at // 10 < 7 for at in range(100)]
    alone = mean(right)
    grouped = mean(right, groups=[at // 10 for at in range(100)])
    assert grouped.value == alone.value
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_groups_of_different_sizes_give_the_share_of_items() -> None:
    found = mean([1, 1, 1, 0], groups=["a", "a", "a", "b"])
    assert found.value == 0.75
    assert (found.low, found.high) == (0.0, 1.0)  # both draws may be one group alone


def test_an_interval_is_the_same_again() -> None:
    right = [True, False, True, True, False] * 8
    assert mean(right) == mean(right)


def test_perplexity_is_a_statistic_of_two_sums() -> None:
    """By tokens: a mean of the items' own perplexities would give another number."""
    columns = [[2.0, 1.0], [3.0, 9.0]]
    found = estimate(columns, lambda sums: np.exp(sums[..., 0] / sums[..., 1]))
    assert found.value == pytest.approx(np.exp(0.5))


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=400)
    before = np.stack([hard, np.ones(400)], axis=1)
    after = before + np.array([0.1, 0.0])
    found = paired(after, before)
    assert found.value == pytest.approx(0.1)
    assert found.resolved
    assert found.high - found.low < 0.01 * (mean(hard).high - mean(hard).low)
    noise = paired(np.stack([rng.permutation(hard), np.ones(400)], axis=1), before)
    assert not noise.resolved


def test_no_items_are_refused() -> None:
    with pytest.raises(UsageError, match="no items"):
        mean([])
    with pytest.raises(UsageError, match="measure the same items"):
        paired([[1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]])


def test_one_group_has_no_interval_and_resolves_nothing() -> None:
    """Refuse an interval of one group: each draw is the whole set, and width 0 is no certainty."""
    before = np.stack([np.zeros(9), np.ones(9)], axis=1)
    after = before + np.array([0.1, 0.0])
    several = paired(after, before, groups=[at // 3 for at in range(9)])
    assert (several.groups, several.resolved) == (3, True)
    alone = paired(after, before, groups=["one"] * 9)
    assert (alone.count, alone.groups) == (9, 1)
    assert alone.low == alone.high == pytest.approx(0.1)
    assert not alone.resolved
    assert str(alone) == "0.100 (one group)"
    assert not paired(after[:1], before[:1]).resolved  # an item is a group
