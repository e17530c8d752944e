"""CIDEr-D against numbers worked out by hand from the paper's equations."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgraft.evaluation.metrics.captions import CiderD, measure_captions, words_of


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog, running!", ["a", "dog", "running"]),
        ("The dog's ball", ["the", "dog", "'s", "ball"]),
        ("It isn’t a cat", ["it", "is", "n't", "a", "cat"]),
        ("black-and-white, 2.5 m.", ["black-and-white", "2.5", "m"]),
        ("'quoted'", ["quoted"]),
        ("红色的 dog", ["红", "色", "的", "dog"]),
        ("!?", []),
    ],
)
def test_words_are_cut_as_in_the_treebank(caption: str, words: list[str]) -> None:
    assert words_of(caption) == words


def test_the_right_caption_scores_ten_and_another_nothing() -> None:
    cider = CiderD([["a red dog runs"], ["two small cats sleep"]])
    assert cider.score(0, "A red dog runs.") == pytest.approx(10)
    assert cider.score(0, "two small cats sleep") == 0
    assert cider.score(0, "") == 0


def test_a_short_caption_has_only_the_ns_that_it_has() -> None:
    """Two words: n = 1 and 2 match in full, 3 and 4 are empty; 10 * (1 + 1) / 4."""
    assert CiderD([["red dog"], ["old cat"]]).score(0, "red dog") == pytest.approx(5)


def test_words_that_every_item_has_weigh_nothing() -> None:
    """`a` has idf log(2/2) = 0, `dog` log 2: of n = 1 the cosine is 1, of n = 2 `a dog` counts."""
    cider = CiderD([["a dog"], ["a cat"]])
    assert cider.score(0, "a dog") == pytest.approx(5)
    assert cider.score(0, "a fox") == 0  # `fox` is in no reference, `a` in all


def test_repeating_a_word_does_not_pay() -> None:
    """Clipped counts: min(3, 1) * 1 / (3 * 1) for n = 1, lengths 3 and 1; n = 2 on: nothing."""
    found = CiderD([["dog"], ["cat"]]).score(0, "dog dog dog")
    assert found == pytest.approx(10 / 4 * (1 / 3) * math.exp(-(2**2) / (2 * 36)))


def test_a_longer_caption_is_punished() -> None:
    """`red dog` against `dog`: weights log 2 each, cosine 1 / sqrt 2, one word longer."""
    found = CiderD([["dog"], ["cat"]]).score(0, "red dog")
    assert found == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-1 / 72))


def test_references_are_averaged_and_an_item_counts_once() -> None:
    """df is of items: `dog` in both references of one item still has df 1 of 3 items."""
    cider = CiderD([["dog", "dog"], ["dog", "fox"], ["cat"]])
    assert cider.score(1, "dog") == pytest.approx(10 / 4 / 2)
    weights = {"dog": math.log(3 / 2), "cat": math.log(3)}
    # `dog cat` against `cat`: only `cat` is shared.
    cosine = weights["cat"] / math.hypot(weights["dog"], weights["cat"])
    assert cider.score(2, "dog cat") == pytest.approx(10 / 4 * cosine * math.exp(-1 / 72))


WORDS = ["a", "red", "dog", "runs", "on", "two", "cats"]
CAPTIONS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9)


@given(st.lists(st.lists(CAPTIONS, min_size=1, max_size=3), min_size=2, max_size=5), CAPTIONS)
def test_a_score_lies_between_nothing_and_ten_and_equals_an_explicit_one(items, said) -> None:
    references = [[" ".join(words) for words in item] for item in items]
    cider = CiderD(references)
    for place, item in enumerate(items):
        score = cider.score(place, " ".join(said))
        assert -1e-9 <= score <= 10 + 1e-9
        assert score == pytest.approx(_explicit(said, item, items), abs=1e-9)


def _explicit(said: list[str], references: list[list[str]], items: list[list[list[str]]]) -> float:
    """Eqs. 1 to 5 with a vector over every n-gram that there is."""
    total = 0.0
    for n in (1, 2, 3, 4):

        def grams(words: list[str], n: int = n) -> list[tuple[str, ...]]:
            return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]

        known = sorted({one for item in [[said], *items] for ref in item for one in grams(ref)})
        idf = []
        for one in known:
            having = sum(any(one in grams(ref) for ref in item) for item in items)
            idf.append(math.log(len(items) / max(having, 1)))
        mine = [grams(said).count(one) * idf[at] for at, one in enumerate(known)]
        for reference in references:
            other = [grams(reference).count(one) * idf[at] for at, one in enumerate(known)]
            below = math.hypot(*mine) * math.hypot(*other)
            if below:
                above = sum(min(a, b) * b for a, b in zip(mine, other, strict=True))
                gap = math.exp(-((len(said) - len(reference)) ** 2) / 72)
                total += above / below * gap / len(references)
    return 10 * total / 4


def test_the_set_scores_the_mean() -> None:
    cider = CiderD([["red dog"], ["old cat"]])
    found = measure_captions(["red dog", "blue fish"], cider)
    assert found.main == "cider"
    assert found.values() == pytest.approx({"cider": 2.5})
