"""Scores of dialogues: by hand, of models that must score what they must, and on a tiny graft."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mmgraft.errors import UsageError
from mmgraft.evaluation import kept
from mmgraft.evaluation.dialogues.dialogues import read_dialogues
from mmgraft.evaluation.dialogues.evaluate import evaluate_iit, measure_generated
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.likelihood.likelihood import score_choices
from mmgraft.evaluation.metrics.answers import ChoiceScore
from mmgraft.evaluation.metrics.scoring import measure_choices
from mmgraft.inference import Answerer
from mmgraft.runs.results import read_results, write_results
from tiny_choice import choice_sets
from tiny_runs import make_parts, make_run


def item(at: int, gold: int, options: tuple[str, ...] = ("a", "a long one", "b")) -> Item:
    return Item(id=str(at), messages=[], question="?", options=options, gold=gold)


def test_accuracies_of_a_hand_worked_dialogue() -> None:
    """Sums favour the first option, tokens and characters the second; the answer names the third.

    -3 / 1, -4 / 4, -9 / 2 a token; -3 / 1, -4 / 10, -9 / 1 a character.
    """
    score = ChoiceScore("0", (-3.0, -4.0, -9.0), (1, 4, 2), (1, 10, 1))
    items = [[item(0, gold)] for gold in range(3)]
    values = [measure_choices(one, [score]).values() for one in items]
    assert [one["accuracy"] for one in values] == [1, 0, 0]
    assert [one["accuracy_per_token"] for one in values] == [0, 1, 0]
    assert [one["accuracy_per_character"] for one in values] == [0, 1, 0]
    named = [measure_generated(one, ["C. b"]).values() for one in items]
    assert [one["accuracy_generated"] for one in named] == [0, 0, 1]
    unread = measure_generated(items[0], ["who knows"]).values()
    assert (unread["unread"], unread["accuracy_generated"]) == (1.0, 0.0)


def test_a_right_model_scores_all_and_a_random_one_chance() -> None:
    rng = random.Random(0)
    items = [item(at, rng.randrange(3)) for at in range(1500)]
    right = [
        ChoiceScore(
            one.id, tuple(0.0 if at == one.gold else -50.0 for at in range(3)), (1,) * 3, (1,) * 3
        )
        for one in items
    ]
    said = ["ABC"[one.gold or 0] for one in items]
    found = measure_choices(items, right).beside(measure_generated(items, said))
    assert found.values() == {
        "accuracy": 1, "accuracy_per_token": 1, "accuracy_per_character": 1,
        "accuracy_generated": 1, "unread": 0,
    }  # fmt: skip
    guessed = [
        ChoiceScore(one.id, tuple(rng.random() for _ in range(3)), (1, 4, 1), (1, 10, 1))
        for one in items
    ]
    # Within three standard deviations.
    assert measure_choices(items, guessed).values()["accuracy"] == pytest.approx(1 / 3, abs=0.04)
    named = measure_generated(items, [rng.choice("ABC") for _ in items]).values()
    assert named["accuracy_generated"] == pytest.approx(1 / 3, abs=0.04)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch) -> None:
    monkeypatch.setattr("mmgraft.evaluation.dialogues.evaluate.MAX_NEW_TOKENS", 3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


def evaluate(parts: Path, run: Path, specs=(), **settings):
    made = make_run(parts, run, "wings") if not run.is_dir() else run
    settings = {"count": 2, "batch_size": 2, **settings}
    return evaluate_iit(Answerer.load(made), made, specs, **settings)


def test_a_run_is_scored_shape_by_shape(
    parts: Path, tmp_path: Path, steps: list[tuple[int, int]]
) -> None:
    run = tmp_path / "run"
    results = evaluate(parts, run, choice_sets(tmp_path))
    assert [one.name for one in results.sets] == [
        "(T)", "(T,T)", "(T,T,T)", "(T,T,V)", "(T,V)", "(V)"
    ]  # fmt: skip
    assert steps[-1] == (2, 2)
    assert list(results.details["against_the_question_alone"]) == [
        "(T,T)", "(T,T,T)", "(T,T,V)", "(T,V)"
    ]  # fmt: skip
    found = read_dialogues(run / "results/iit")
    answerer = Answerer.load(run)
    for shape, one in zip(found, results.sets, strict=True):
        assert one.items == 2
        assert one.settings["chance"] == pytest.approx(1 / 3, abs=1e-3)
        assert one.settings["workflow"] == ("mm" if "V" in shape else "text")
        alone = score_choices(answerer.model, answerer.processor, found[shape], batch_size=1)
        right = [
            score.prediction() == it.gold for score, it in zip(alone, found[shape], strict=True)
        ]
        assert one.scores["accuracy"].value == sum(right) / 2
        lines = (run / (one.predictions or "")).read_text().splitlines()
        assert len(lines) == 3
        ids = {json.loads(line)["id"] for line in lines[1:]}
        assert ids == {it.id for it in found[shape]}
    write_results(run, results)
    assert read_results(run, "iit") == results


def test_what_was_scored_is_not_scored_again(parts: Path, tmp_path: Path, monkeypatch) -> None:
    """A run that was cut off after the first batch of the first shape goes on from there."""
    specs, run = choice_sets(tmp_path), tmp_path / "run"
    whole = evaluate(parts, tmp_path / "whole", specs, batch_size=1)
    asked: list[str] = []
    real = kept.score_choices

    def counting(model, processor, items, *, on_result, **settings):
        def keep(indices, scores):
            on_result(indices, scores)
            asked.extend(score.id for score in scores)
            if len(asked) == 1:
                raise KeyboardInterrupt

        return real(model, processor, items, on_result=keep, **settings)

    monkeypatch.setattr(kept, "score_choices", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(parts, run, specs, batch_size=1)
    results = evaluate(parts, run, specs, batch_size=1)
    assert len(asked) == 12 + 6, "each once, those with an image once more without it"
    assert [one.scores for one in results.sets] == [one.scores for one in whole.sets]
    evaluate(parts, run, specs, batch_size=1)
    assert len(asked) == 12 + 6


def test_another_runs_dialogues_are_asked_as_they_are(parts: Path, tmp_path: Path) -> None:
    first = evaluate(parts, tmp_path / "one", choice_sets(tmp_path))
    saved = tmp_path / "one/results/iit"
    second = evaluate(parts, tmp_path / "two", dialogues=saved)
    assert not (tmp_path / "two/results/iit").exists()
    assert [one.sha256 for one in second.sets] == [one.sha256 for one in first.sets]
    assert [one.scores for one in second.sets] == [one.scores for one in first.sets]
    assert (tmp_path / "two" / (second.sets[0].predictions or "")).is_file()


def test_a_workflow_that_is_not_there_is_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no workflow is called 'grounding'"):
        evaluate(parts, tmp_path / "run", choice_sets(tmp_path), workflow="grounding")
    assert not (tmp_path / "run/results").exists()
