from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from mmgraft.errors import UsageError
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.metrics.answers import ChoiceScore
from mmgraft.evaluation.metrics.boxes import format_box
from mmgraft.evaluation.metrics.scoring import (
    groups_of,
    measure_answers,
    measure_choices,
    measure_prior,
    scores_by_kind,
)
from mmgraft.recipes.evaluation_set import SetSpec

COLOURS = ("red", "green", "blue", "grey")


def spec(metric: str, **more: object) -> SetSpec:
    return SetSpec.model_validate({"name": "set", "metric": metric, **more})


def item(number: int, **more: object) -> Item:
    return Item(str(number), (), f"question {number % 3}", file="set.jsonl", place="line 1", **more)  # type: ignore[arg-type]


def coloured(count: int, repeat: int = 1) -> list[Item]:
    return [item(n, answers=(COLOURS[n % 4],) * repeat) for n in range(count)]


def yes_no(count: int) -> list[Item]:
    return [item(n, answers=("yes" if n % 4 == 0 else "no",)) for n in range(count)]


def captions(count: int) -> list[Item]:
    words = [f"word{n} in picture{n} shows thing{n}" for n in range(count)]
    return [item(n, answers=(words[n],)) for n in range(count)]


def boxed(count: int) -> list[Item]:
    return [item(n, box=(n % 7, 3, n % 7 + 20, 30), size=(40, 32)) for n in range(count)]


SETS: dict[str, tuple[SetSpec, Callable[[int], list[Item]]]] = {
    "exact": (spec("exact"), coloured),
    "vqa": (spec("vqa"), coloured),
    "vqa_v2": (spec("vqa_v2"), lambda count: coloured(count, 10)),
    "yes_no": (spec("yes_no"), yes_no),
    "caption": (spec("caption"), captions),
    **{
        f"box {boxes}": (spec("box", boxes=boxes), boxed)
        for boxes in ("unit", "thousand", "ten", "pixel", "cogvlm", "qwen")
    },
}


def truth(one: SetSpec, each: Item) -> str:
    if one.metric != "box":
        return each.answers[0]
    assert each.box is not None
    assert each.size is not None
    assert one.boxes is not None
    return format_box(each.box, one.boxes, each.size)


@pytest.mark.parametrize("name", SETS)
def test_a_model_that_is_always_right_has_every_point(name: str) -> None:
    one, make = SETS[name]
    items = make(12)
    measured = measure_answers(one, items, [truth(one, each) for each in items])
    values = measured.values()
    if one.metric == "caption":
        assert values["cider"] == pytest.approx(10.0)
    elif one.metric == "yes_no":
        assert [values[key] for key in ("accuracy", "precision", "recall", "f1")] == [1.0] * 4
        assert values["yes_ratio"] == pytest.approx(0.25)
    elif one.metric == "box":
        assert values["precision_at_0.5"] == 1.0
        assert values["malformed"] == 0.0
        assert values["mean_iou"] > (0.8 if one.boxes == "ten" else 0.9)
    else:
        assert values == {"accuracy": 1.0}
    assert measured.main == next(iter(values))


@pytest.mark.parametrize("name", SETS)
def test_a_model_that_says_nothing_has_none(name: str) -> None:
    one, make = SETS[name]
    items = make(12)
    values = measure_answers(one, items, [""] * len(items)).values()
    if one.metric == "yes_no":  # POPE counts what is neither as a yes, and says so
        assert values["unread"] == 1.0
        assert values["accuracy"] == pytest.approx(0.25)
    else:
        assert values.pop("malformed", 1.0) == 1.0
        assert set(values.values()) == {0.0}


def test_a_model_that_guesses_scores_what_chance_gives() -> None:
    """Its share of right answers lies in an interval round 1/4, and in no narrower one."""
    rng = random.Random(0)
    items = coloured(2000)
    one = measure_answers(spec("exact"), items, [rng.choice(COLOURS) for _ in items])
    found = one.scores(groups_of(items))["accuracy"]
    assert found.low < 0.25 < found.high
    assert 0.03 < found.high - found.low < 0.05  # 4 standard errors of 0.0097
    said = ["yes" if rng.random() < 0.5 else "no" for _ in range(2000)]
    half = measure_answers(spec("yes_no"), yes_no(2000), said).values()
    assert half["accuracy"] == pytest.approx(0.5, abs=0.04)
    assert half["precision"] == pytest.approx(0.25, abs=0.04)
    assert half["recall"] == pytest.approx(0.5, abs=0.06)
    assert half["f1"] == pytest.approx(1 / 3, abs=0.04)


def test_any_of_several_right_answers_counts() -> None:
    items = [item(0, answers=("red", "crimson")), item(1, answers=("red",))]
    values = measure_answers(spec("exact"), items, ["crimson", "crimson"]).values()
    assert values == {"accuracy": 0.5}
    assert measure_answers(spec("exact"), items, ["a red", "red."]).values() == {"accuracy": 0.0}
    assert measure_answers(spec("vqa"), items, ["a red", "red."]).values() == {"accuracy": 1.0}


def test_choices_are_weighed_by_their_length_in_three_ways() -> None:
    """Worked by hand: sums say the first, per token the second, per character the third."""
    items = [item(0, options=("aa", "b b b", "c" * 12), gold=gold) for gold in (0, 1, 2)]
    scores = [ChoiceScore(each.id, (-2.0, -3.0, -4.0), (1, 3, 2), (2, 5, 24)) for each in items]
    assert measure_choices(items, scores).columns[:, :3].tolist() == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
    ]
    assert measure_choices(items, scores).main == "accuracy"


def test_prior_answers_as_training_mostly_did() -> None:
    seen = [("question 0", "red"), ("question 0", "red"), ("question 0", "blue"), ("other", "blue")]
    seen += [("other", "blue")]
    items = [
        item(0, answers=("red",)),
        item(1, answers=("blue",)),  # never asked in training: the most frequent answer of all
        item(3, answers=("blue",)),
    ]
    right = measure_prior(spec("exact"), items, seen).columns[:, 0]
    assert right.tolist() == [1, 1, 0]


def test_prior_chooses_the_option_that_was_right_most_often() -> None:
    seen = [("question 0", "red"), ("other", "blue"), ("other", "blue"), ("other", "grey")]
    options = ("grey", "blue", "red")
    items = [
        item(0, options=options, gold=2),
        item(1, options=options, gold=1),
        item(2, options=("black", "white"), gold=0),  # neither was seen: the first
    ]
    measured = measure_prior(spec("choice"), items, seen)
    assert measured.columns[:, 0].tolist() == [1, 1, 1]
    assert list(measured.statistics) == ["accuracy"]


def test_kinds_are_scored_by_themselves() -> None:
    items = [
        item(n, answers=("yes",), kind=kind, group="picture")
        for n, kind in enumerate(["b", "a", "b", None])
    ]
    measured = measure_answers(spec("exact"), items, ["yes", "no", "no", "no"])
    found = scores_by_kind(measured, items)
    assert {kind: one["accuracy"].value for kind, one in found.items()} == {"a": 0.0, "b": 0.5}
    assert list(found) == ["a", "b"]
    assert found["b"]["accuracy"].count == 2
    assert scores_by_kind(measured, [item(n) for n in range(4)]) == {}


@pytest.mark.parametrize(
    ("metric", "bad"),
    [
        ("yes_no", item(0, answers=("maybe",))),
        ("box", item(0, answers=("[0,0,1,1]",))),
    ],
)
def test_what_the_data_cannot_give_is_refused(metric: str, bad: Item) -> None:
    with pytest.raises(UsageError, match=r"set\.jsonl, line 1"):
        measure_answers(spec(metric, boxes="unit"), [bad], ["yes"])


def test_multiple_choice_is_not_scored_by_words() -> None:
    with pytest.raises(UsageError, match="choice does not score"):
        measure_answers(spec("choice"), [item(0, options=("a", "b"), gold=0)], ["a"])


def test_captions_that_cannot_be_scored_are_named_with_file_and_row() -> None:
    two = [item(1, answers=("a dog",)), item(2, answers=("!",))]
    with pytest.raises(UsageError, match=r"set.jsonl, line 1 \(id 2\): no caption with a word"):
        measure_answers(spec("caption"), two, ["", ""])
    with pytest.raises(UsageError, match=r"set.jsonl: .* give at least two"):
        measure_answers(spec("caption"), two[:1], [""])
