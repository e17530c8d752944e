from __future__ import annotations

import pytest

from mmgraft.errors import UsageError
from mmgraft.evaluation.metrics.answers import measure_yes_no, read_yes_no, truth_of


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("Yes", True),
        ("no.", False),
        ("NO!", False),
        ("Yes, there is no doubt.", True),  # the first word decides
        ("There is not a dog here.", False),
        ("There isn't one", False),
        ("There isn’t one", False),
        ("I think yes.", True),
        ("It is a dog. No cat.", None),  # the first sentence alone is read
        ("a dog\nno", None),
        ("Nothing", None),  # a word, not the start of one
        ("", None),
    ],
)
def test_answers_are_read_by_first_word_and_first_sentence(answer: str, says: bool | None) -> None:
    assert read_yes_no(answer) is says


def test_scores_of_a_hand_worked_table() -> None:
    """3 true yes, 1 false yes, 2 false no, 4 true no."""
    given = ["yes"] * 4 + ["no"] * 6
    truth = [True] * 3 + [False] + [True] * 2 + [False] * 4
    assert measure_yes_no(given, truth).values() == pytest.approx(
        {
            "accuracy": 7 / 10,
            "precision": 3 / 4,
            "recall": 3 / 5,
            "f1": 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5),
            "yes_ratio": 4 / 10,
            "unread": 0.0,
        }
    )


def test_an_answer_that_says_neither_counts_as_a_yes_and_is_counted() -> None:
    found = measure_yes_no(["a dog", "a dog", "no", "yes"], [True, False, False, True]).values()
    assert found["unread"] == 0.5
    assert found["yes_ratio"] == 0.75
    assert found["accuracy"] == 0.75
    assert found["precision"] == pytest.approx(2 / 3)


def test_always_right_and_always_yes_score_what_they_must() -> None:
    truth = [True, False] * 20
    right = measure_yes_no(["yes", "no"] * 20, truth)
    assert right.values() == {
        "accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes_ratio": 0.5, "unread": 0,
    }  # fmt: skip
    scores = right.scores()
    assert (scores["f1"].low, scores["f1"].high) == (1.0, 1.0)
    always = measure_yes_no(["yes"] * 40, truth).values()
    assert (always["accuracy"], always["recall"], always["yes_ratio"]) == (0.5, 1.0, 1.0)
    assert always["f1"] == pytest.approx(2 / 3)


def test_never_a_yes_has_no_precision_and_no_f1() -> None:
    found = measure_yes_no(["no", "no"], [True, False]).values()
    assert (found["precision"], found["recall"], found["f1"]) == (0.0, 0.0, 0.0)
    assert found["accuracy"] == 0.5


def test_f1_of_resamples_is_of_their_sums() -> None:
    """Its interval holds the value, which a mean of one F1 an item would not have."""
    f1 = measure_yes_no(["yes", "yes", "no"] * 10, [True, False, True] * 10).scores()["f1"]
    assert f1.value == pytest.approx(0.5)
    assert f1.low < 0.5 < f1.high


def test_truth_is_yes_or_no() -> None:
    assert truth_of(" Yes.", "row") is True
    assert truth_of("No!", "row") is False
    with pytest.raises(UsageError, match=r"test\.jsonl, line 3: the answer is 'blue', and yes_no"):
        truth_of("blue", "test.jsonl, line 3")
