from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgraft.evaluation.report.words import (
    change_with_interval,
    decimals_for,
    direction,
    duration,
    interval,
    listed,
    megabytes,
    number,
    score_name,
    signed,
    verdict,
    with_interval,
)
from mmgraft.runs.results import Score


def found(value: float, low: float, high: float) -> Score:
    return Score(value=value, low=low, high=high, count=100)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8234, "0.823"),
        (0, "0"),
        (-0.0123, "−0.012"),
        (28.4, "28.40"),
        (1234.5, "1,234"),
        (0.00012345, "0.00012"),
        (3e-12, "3.0e−12"),
        (math.inf, "infinite"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_have_the_decimals_that_their_size_needs(value: float, text: str) -> None:
    assert number(value) == text


def test_a_number_and_its_interval_have_the_same_decimals() -> None:
    assert with_interval(found(0.8, 0.78, 0.82)) == "0.800 (0.780 to 0.820)"
    assert with_interval(found(28.41, 28.4099, 28.4101)) == "28.41000 (28.40990 to 28.41010)"
    assert interval(found(0.5, 0.5, 0.5)) == "0.500 to 0.500"


def test_changes_have_signs_and_zero_says_that_it_is_exact() -> None:
    assert change_with_interval(found(0.012, -0.004, 0.028)) == "+0.012 (−0.004 to +0.028)"
    assert change_with_interval(found(0, 0, 0)) == "0 (exactly)"
    assert change_with_interval(found(0, -0.01, 0.01)) == "0.000 (−0.010 to +0.010)"
    assert signed(-1e-9, 3) == "0.000"


@pytest.mark.parametrize(
    ("change", "name", "word"),
    [
        ((0.05, 0.01, 0.09), "accuracy", "better"),
        ((-0.05, -0.09, -0.01), "accuracy", "worse"),
        ((0.05, 0.01, 0.09), "perplexity", "worse"),
        ((-0.05, -0.09, -0.01), "word_perplexity", "better"),
        ((0.05, -0.01, 0.09), "accuracy", "not resolved"),
        ((0.05, 0.0, 0.09), "accuracy", "not resolved"),
        ((0, 0, 0), "accuracy", "the same"),
        ((0, -0.1, 0.1), "accuracy", "not resolved"),
        ((0.05, 0.01, 0.09), "yes_ratio", "higher"),
        ((-0.05, -0.09, -0.01), "yes_ratio", "lower"),
    ],
)
def test_a_difference_comes_to_a_word(
    change: tuple[float, float, float], name: str, word: str
) -> None:
    assert verdict(found(*change), name) == word


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (-1, "word_perplexity kl_to_base loss nll bits_per_byte shift_all_layers malformed unread"),
        (0, "yes_ratio kept"),
        (1, "accuracy precision_at_0.5 recall f1 cider mean_iou exact_match"),
    ],
)
def test_directions(wanted: int, names: str) -> None:
    found = {name: direction(name) for name in (*names.split(), *names.upper().split())}
    assert found == dict.fromkeys(found, wanted)


@given(st.floats(-1e9, 1e9), st.floats(0, 1e3))
def test_what_is_printed_is_the_number_to_two_digits_of_the_interval(
    value: float, half: float
) -> None:
    decimals = decimals_for(value, value - half, value + half)
    text = number(value, decimals).replace(",", "").replace("−", "-")
    wide = (value + half) - (value - half)
    assert abs(float(text) - value) <= max(0.06 * wide, 0.06 * abs(value), 0.51) * 1.0001
    if wide > 1e-5 and abs(value) < 1e3:
        assert abs(float(text) - value) <= 0.06 * wide


def test_durations_sizes_and_lists() -> None:
    assert [duration(s) for s in (4.2, 48, 89, 90, 750, 3600, 5100)] == [
        "4.2 s", "48 s", "89 s", "2 min", "12 min", "1 h", "1 h 25 min",
    ]  # fmt: skip
    assert (megabytes(812.4), megabytes(3115.8)) == ("812 MB", "3.1 GB")
    assert [listed(one) for one in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "", "a", "a and b", "a, b and c",
    ]  # fmt: skip


def test_names_of_scores() -> None:
    assert score_name("precision_at_0.5") == "precision at IoU 0.5"
    assert score_name("accuracy_per_token") == "accuracy per token"


def test_one_group_is_told_and_never_resolved() -> None:
    alone = Score(value=0.2, low=0.2, high=0.2, count=50, groups=1)
    assert with_interval(alone) == "0.200 (one group, no interval)"
    assert change_with_interval(alone) == "+0.200 (one group, no interval)"
    assert verdict(alone, "accuracy") == "not resolved"
    assert verdict(Score(value=0.2, low=0.2, high=0.2, count=50, groups=2), "accuracy") == "better"
