from __future__ import annotations

import numpy as np
import pytest

from mmgraft.errors import UsageError
from mmgraft.evaluation.metrics.intervals import Measured, mean, share


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
