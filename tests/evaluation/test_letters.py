from __future__ import annotations

import random
from string import ascii_uppercase

import pytest

from mmgraft.evaluation.metrics.answers import read_choice

OPTIONS = ["red", "dark red", "blue", "a dog"]


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        ("B", 1),
        (" b\n", 1),
        ("(C)", 2),
        ("C.", 2),
        ("C) blue", 2),
        ("B. red", 1),  # the letter counts, not the words after it
        ("The answer is B", 1),
        ("The correct option is (C), since it is red.", 2),
        ("Answer: C", 2),
        ("E", None),  # no such option
        ("E. blue", None),
        ("Blue.", 2),
        ("It is blue", 2),
        ("dark red", 1),
        ("It is dark red.", 1),  # not `red` within it
        ("red", 0),
        ("red or blue", None),
        ("A dog", 3),  # an article, not a letter
        ("The answer is a dog", 3),
        ("I see a dog", 3),
        ("the answer is blue", 2),
        ("green", None),
        ("bluebird", None),
        ("", None),
    ],
)
def test_an_answer_is_read_by_letter_then_by_words(answer: str, place: int | None) -> None:
    assert read_choice(answer, OPTIONS) == place


def test_options_that_say_the_same_cannot_be_told_by_words() -> None:
    assert read_choice("blue", ["Blue", "blue."]) is None
    assert read_choice("B", ["Blue", "blue."]) == 1


def test_an_option_without_words_is_not_found_everywhere() -> None:
    assert read_choice("it is red", ["!", "red"]) == 1


def test_random_letters_score_chance_and_right_ones_all() -> None:
    rng = random.Random(0)
    gold = [rng.randrange(4) for _ in range(2000)]
    drawn = [read_choice(rng.choice(ascii_uppercase[:4]), OPTIONS) for _ in gold]
    share = sum(one == two for one, two in zip(drawn, gold, strict=True)) / len(gold)
    assert share == pytest.approx(0.25, abs=0.03)  # three standard deviations
    assert [read_choice(ascii_uppercase[at], OPTIONS) for at in gold] == gold
    assert [read_choice(OPTIONS[at], OPTIONS) for at in gold] == gold
