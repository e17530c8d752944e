from __future__ import annotations

import numpy as np
import pytest

from mmgraft.errors import UsageError
from mmgraft.evaluation.metrics.intervals import Measured, estimate, mean, over_seeds, paired, share


def test_means_are_those_of_each_list_and_the_first_is_the_main_one() -> None:
    found = Measured.means(right=[True, False, True, True], overlap=[0.5, 0.0, 1.0, 0.7])
    assert found.main == "right"
    assert found.values() == pytest.approx({"right": 0.75, "overlap": 0.55})
    groups = ["a", "a", "b", "c"]
    assert found.scores(groups)["right"] == mean([1, 0, 1, 1], groups)


def test_a_part_has_the_scores_of_its_items_alone() -> None:
    found = Measured.means(right=[True, False, True, True])
    assert found.of([0, 1]).values() == {"right": 0.5}
    assert found.of([2, 3]).values() == {"right": 1.0}


def test_two_metrics_stand_beside_each_other() -> None:
    """Columns are named from their end too, which moves."""
    one = Measured.means(right=[True, False, True, True])
    other = Measured.means(read=[False, False, True, False], overlap=[0.5, 0.5, 0.0, 0.0])
    both = one.beside(other)
    assert both.main == "right"
    assert both.values() == {"right": 0.75, "read": 0.25, "overlap": 0.25}
    assert both.scores()["read"] == other.scores()["read"]


def test_a_change_is_after_minus_before_of_the_same_items() -> None:
    after = Measured.means(right=[True] * 30 + [False] * 10)
    before = Measured.means(right=[True] * 10 + [False] * 30)
    change = after.change(before)["right"]
    assert change.value == 0.5
    assert change.resolved
    assert not after.change(after)["right"].resolved


def test_no_items_have_no_scores() -> None:
    with pytest.raises(UsageError, match="no items"):
        Measured.means(right=[]).scores()


def test_a_share_of_nothing_is_zero() -> None:
    assert share(0, 1)(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [0.75, 0.0]


def _answers(rng: np.random.Generator, share: float, count: int = 60) -> Measured:
    return Measured.means(right=rng.random(count) < share)


def test_one_training_has_the_interval_of_its_items_alone() -> None:
    rng = np.random.default_rng(1)
    one, other = _answers(rng, 0.7), _answers(rng, 0.5)
    groups = [at // 3 for at in range(60)]
    assert over_seeds([one], groups=groups) == estimate(one.columns, groups=groups)
    assert over_seeds([one], [other], groups) == paired(one.columns, other.columns, groups=groups)


def test_trainings_that_differ_widen_the_interval_over_seeds() -> None:
    """The mean of all; the same items for each, so that what all miss is no doubt about seeds."""
    rng = np.random.default_rng(2)
    low, high = _answers(rng, 0.4), _answers(rng, 0.9)
    both = over_seeds([low, high])
    assert both.value == pytest.approx(np.mean([*low.values().values(), *high.values().values()]))
    assert both.low < low.values()["right"] + 0.05 < high.values()["right"] - 0.05 < both.high
    twice = over_seeds([low, low])
    assert (twice.low, twice.high) == pytest.approx((mean(low.columns[:, 0]).low,
                                                     mean(low.columns[:, 0]).high))  # fmt: skip
    assert twice.count == both.count == 60


def test_a_difference_over_seeds_has_the_items_in_common_and_not_the_seeds() -> None:
    rng = np.random.default_rng(3)
    seeds = [_answers(rng, 0.5) for _ in range(3)]
    spread = [Measured.means(right=one.columns[:, 0] > 2) for one in seeds[:1]]  # never right
    change = over_seeds(seeds, spread)
    assert change.value == over_seeds(seeds).value
    uneven = [_answers(rng, 0.1), _answers(rng, 0.9)]
    same = over_seeds(uneven, uneven)
    assert same.value == 0
    assert same.low < -0.5 < 0.5 < same.high, "paired by seed it would be zero for certain"


def test_scores_of_other_columns_are_subtracted_by_their_own_statistic() -> None:
    wide = Measured(np.array([[9.0, 1.0, 2.0], [9.0, 0.0, 2.0]]), {"right": share(1, 2)}, "right")
    narrow = Measured.means(right=[True, True])
    assert over_seeds([wide], [narrow]).value == pytest.approx(0.25 - 1)
