from __future__ import annotations

import pytest

from mmgraft.evaluation.metrics.answers import (
    Prior,
    by_kind,
    exact,
    normalised,
    vqa_match,
    vqa_v2,
)


@pytest.mark.parametrize(
    ("given", "truth", "right"),
    [
        ("Blue", "blue", True),
        (" blue\n", "blue", True),
        ("blue.", "blue", False),
        ("a blue", "blue", False),
        ("", "no", False),
    ],
)
def test_exact_forgives_case_and_white_space_alone(given: str, truth: str, right: bool) -> None:
    assert exact(given, truth) is right


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        ("A blue rectangle.", "blue rectangle"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("2.5 m.", "2.5 m"),
        ("yes, it is!", "yes it is"),
        ("black-and-white", "black and white"),
        ("dog's", "dog's"),
        ("u.s.", "us"),  # the challenge deletes a full stop, it puts no space there
        (".5", ".5"),
        ("10:30", "10:30"),
        ("another", "another"),  # an article is a word, not the start of one
    ],
)
def test_normalisation_follows_the_vqa_rules(given: str, clean: str) -> None:
    assert normalised(given) == clean


def test_vqa_match_compares_what_is_normalised() -> None:
    assert vqa_match("The circle.", "circle")
    assert not vqa_match("circles", "circle")


@pytest.mark.parametrize(
    ("agreeing", "score"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_v2_averages_over_nine_of_ten_people(agreeing: int, score: float) -> None:
    """With 3 who agree: three choices leave 2 of them (2/3), seven leave all (1): 9/10."""
    answers = ["The cat."] * agreeing + [f"dog {at}" for at in range(10 - agreeing)]
    assert vqa_v2("cat", answers) == pytest.approx(score)


def test_by_kind_splits_the_share() -> None:
    assert by_kind([True, False, True, True], ["b", "b", "a", "b"]) == {"a": 1.0, "b": 2 / 3}


def test_prior_gives_the_most_frequent_answer_to_each_question() -> None:
    prior = Prior([("q", "no"), ("q", "yes"), ("q", "no"), ("color?", "red"), ("color?", "blue")])
    assert prior("q") == "no"
    assert prior("color?") == "blue"  # a tie goes to the first in the alphabet
    assert prior("never asked") == "no"
