"""Check that settings of a set, a run and a command line reach the evaluation."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmgraft.evaluation import kept
from mmgraft.evaluation.dialogues.evaluate import evaluate_iit
from mmgraft.evaluation.evaluate import Evaluation, evaluate_run
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.kept import Kept, read_predictions
from mmgraft.evaluation.likelihood.likelihood import score_choices
from mmgraft.evaluation.metrics.intervals import LEVEL, RESAMPLES, Measured, interval_of, mean
from mmgraft.evaluation.metrics.scoring import ANSWER_TOKENS, groups_of, scores_by_kind
from mmgraft.evaluation.sets import read_sets
from mmgraft.evaluation.text import evaluate_text
from mmgraft.evaluation.vision import evaluate_vision
from mmgraft.inference import Answerer
from mmgraft.recipes.evaluation_set import SetSpec
from tiny_choice import choice_sets
from tiny_runs import make_parts, make_run
from tiny_towers import picture

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and eight questions on two pictures; the training rows have other answers."""
    parts = make_parts(tmp_path_factory.mktemp("wiring"))
    make_run(parts, parts / "fresh", "iaa")
    rows, seen = [], []
    for number in range(8):
        name = f"q{number // 4}.png"
        picture(20 + 10 * (number // 4), 30).save(parts / "images" / name)
        row = {
            "id": f"n{number}", "image": name, "kind": "ab"[number % 2], "options": list(COLOURS),
            "question": f"which colour, {number}?", "answer": COLOURS[number % 3],
        }  # fmt: skip
        rows.append(row)
        # Right for the numbers below 2 alone, by what was answered to the same question.
        seen.append({**row, "answer": COLOURS[(number + (number >= 2)) % 3]})
    for name, listed in (("rows", rows), ("seen", seen)):
        lines = "".join(json.dumps(row) + "\n" for row in listed)
        (parts / f"{name}.q.jsonl").write_text(lines)
    return parts


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "fresh", tmp_path / "run"))


def spec(folder: Path, metric: str = "exact", **more: Any) -> SetSpec:
    values = {
        "name": metric, "metric": metric, "path": str(folder / "rows.q.jsonl"),
        "images": str(folder / "images"), "train": str(folder / "seen.q.jsonl"), **more,
    }  # fmt: skip
    return SetSpec.model_validate(values)


# -- what is drawn together --------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["exact", "choice"])
def test_questions_about_one_image_are_drawn_together(folder: Path, run: Path, metric: str) -> None:
    (found,) = evaluate_vision(Answerer.load(run), run, [spec(folder, metric)]).sets
    every = [found.scores, *found.blind.values()]
    assert len(every) == 3
    assert {(one.count, one.groups) for scores in every for one in scores.values()} == {(8, 2)}
    kinds = [one for scores in found.kinds.values() for one in scores.values()]
    assert {(one.count, one.groups) for one in kinds} == {(4, 2)}


def test_questions_on_one_passage_are_drawn_together(run: Path, tmp_path: Path) -> None:
    """Items of text with one passage, or with one `group`."""
    rows = [
        {"id": str(n), "passage": f"On {n // 3}.", "question": f"is it {n}?", "options": ["a", "b"],
         "answer": "a", "kind": "x"}
        for n in range(6)
    ]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = SetSpec(name="t", metric="choice", modality="text", path=str(tmp_path / "t.jsonl"))
    (found,) = evaluate_text(Answerer.load(run), run, [one]).sets
    shown = [*found.scores.values(), *found.base.values(), *found.change.values()]
    shown += [score for kind in found.kinds.values() for score in kind.values()]
    assert {(score.count, score.groups) for score in shown} == {(6, 2)}


def test_dialogues_whose_last_questions_share_an_image_are_drawn_together(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    text, _ = choice_sets(tmp_path)
    seen = spec(folder, "choice", name="seen", prompt="{question}")
    results = evaluate_iit(Answerer.load(run), run, [text, seen], count=4, batch_size=4)
    of = {one.name: one for one in results.sets}
    for name in ("(V)", "(T,V)"):
        shown = [*of[name].scores.values(), *of[name].blind["no_image"].values()]
        assert {score.groups for score in shown} <= {1, 2}, name
        assert {score.count for score in shown} == {4}
    changes = results.details["against_the_question_alone"]["(T,V)"]
    assert {one["groups"] for one in changes.values()} <= {1, 2}
    assert {score.groups for score in of["(T)"].scores.values()} == {of["(T)"].items} == {3}


def test_a_group_comes_before_the_item_itself() -> None:
    items = [Item(str(n), [], "?", group=group) for n, group in enumerate(["a", "a", None, None])]
    assert groups_of(items) == ["a", "a", "2", "3"]


def test_kinds_are_drawn_by_their_own_groups() -> None:
    items = [Item(str(n), [], "?", group=str(n // 2), kind="ab"[n >= 4]) for n in range(8)]
    found = scores_by_kind(Measured.means(x=[n % 2 for n in range(8)]), items)
    assert {kind: (one["x"].count, one["x"].groups) for kind, one in found.items()} == {
        "a": (4, 2), "b": (4, 2),
    }  # fmt: skip


# -- intervals ---------------------------------------------------------------------------------


def test_an_interval_leaves_out_a_fortieth_on_each_side() -> None:
    assert LEVEL == 0.95
    assert interval_of(list(range(1001))) == pytest.approx((25.0, 975.0))
    assert RESAMPLES == 1000


def test_an_interval_has_the_width_of_the_normal_approximation() -> None:
    """1.96 standard errors on each side; 1.64 would be a level of 90 %, 2.58 one of 99 %."""
    found = mean([n % 2 for n in range(400)])
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.5 / 20, rel=0.06)


# -- prior and blind ---------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["exact", "choice"])
def test_a_prior_knows_the_training_answers_alone(folder: Path, metric: str) -> None:
    (read,) = read_sets([spec(folder, metric)], "image")
    assert read.prior is not None
    assert read.prior.values()["accuracy"] == 2 / 8


def test_what_is_asked_blind_has_no_image(
    folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[bool]] = {}
    real = Kept._rows

    def spy(self: Kept, name: str, items: list[Item], *args: Any) -> Any:
        asked.setdefault(name, []).extend(item.has_image for item in items)
        return real(self, name, items, *args)

    monkeypatch.setattr(Kept, "_rows", spy)
    answerer = Answerer.load(run)
    evaluate_vision(answerer, run, [spec(folder), spec(folder, "choice")])
    text, _ = choice_sets(tmp_path)
    seen = spec(folder, "choice", name="seen", prompt="{question}")
    results = evaluate_iit(answerer, run, [text, seen], count=2)
    assert len(asked) == 4 + 6 * 2 + 3
    for name, images in asked.items():
        shown = not name.endswith(".no_image") and "T" not in name.rpartition(".")[0][-1:]
        if name.startswith("iit."):
            shown = "V" in name.split(".")[1] and not name.endswith(".no_image")
        assert set(images) == {shown}, name
    blind = [one for one in results.sets if "no_image" in one.blind]
    assert [one.name for one in blind] == ["(T,T,V)", "(T,V)", "(V)"]
    for one in blind:  # of those rows, not of the ones with images
        shape = one.name.strip("()").replace(",", "")
        rows = read_predictions(run / f"results/predictions/iit.{shape}.no_image.jsonl")
        right = [row["answer"] == row["truth"][0] for row in rows]
        assert one.blind["no_image"]["accuracy"].value == sum(right) / 2


# -- how a set is asked ------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """Return what the two ways of asking are called with."""
    calls: dict[str, list[dict[str, Any]]] = {"answers": [], "choices": []}
    for name, calls_ in calls.items():
        real = getattr(Kept, name)

        def spy(
            self: Kept, *args: Any, _real: Any = real, _calls: Any = calls_, **more: Any
        ) -> Any:
            bound = inspect.signature(_real).bind(self, *args, **more)
            bound.apply_defaults()
            _calls.append(dict(bound.arguments))
            return _real(self, *args, **more)

        monkeypatch.setattr(Kept, name, spy)
    return calls


def test_a_set_is_asked_by_its_own_settings(folder: Path, run: Path, seen) -> None:
    sets = [
        spec(folder, name="long", max_new_tokens=3, limit=5, seed=3),
        spec(folder, name="usual"),
        spec(folder, "choice", name="words", prompt="{question} "),
        spec(folder, "choice", name="letters", prompt="{question}\n{options}"),
    ]
    results = evaluate_vision(Answerer.load(run), run, sets, batch_size=3)
    answers = {call["name"]: call for call in seen["answers"]}
    assert answers["long"]["max_new_tokens"] == answers["long.no_image"]["max_new_tokens"] == 3
    assert answers["usual"]["max_new_tokens"] == ANSWER_TOKENS["exact"] == 16
    assert answers["usual"]["features"] is not None
    assert answers["usual.no_image"]["features"] is None
    assert all(call["self"].batch_size == 3 for calls in seen.values() for call in calls)
    choices = {call["name"]: call["letters"] for call in seen["choices"]}
    assert choices == {
        "words": False, "words.no_image": False, "letters": True, "letters.no_image": True,
    }  # fmt: skip
    of = {one.name: one.settings for one in results.sets}
    assert (of["long"]["max_new_tokens"], of["long"]["limit"], of["long"]["seed"]) == (3, 5, 3)
    assert of["long"]["batch_size"] == 3
    assert of["long"]["train"] == "seen.q.jsonl"
    assert "limit" not in of["usual"]
    assert "seed" not in of["usual"]
    assert of["letters"]["prompt"] == "{question}\n{options}"
    assert "max_new_tokens" not in of["words"]


def test_characters_are_no_bytes(folder: Path, run: Path) -> None:
    answerer = Answerer.load(run)
    item = Item("1", [{"role": "user", "content": "?"}], "?", options=("ü", "ßä€", "no"), gold=0)
    (score,) = score_choices(answerer.model, answerer.processor, [item])
    assert score.characters == (1, 3, 2)
    assert score.tokens != score.characters


# -- an evaluation as a whole ------------------------------------------------------------------

PARTS = {
    "text": "mmgraft.evaluation.text.evaluate_text",
    "vision": "mmgraft.evaluation.vision.evaluate_vision",
    "iit": "mmgraft.evaluation.dialogues.evaluate.evaluate_iit",
    "tasks": "mmgraft.evaluation.lm_eval.harness.evaluate_harness",
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Return what each part of an evaluation is called with; nothing is evaluated."""
    calls: dict[str, dict[str, Any]] = {}
    for name, target in PARTS.items():
        module, _, function = target.rpartition(".")
        real = getattr(__import__(module, fromlist=[function]), function)

        def spy(*args: Any, _real: Any = real, _name: str = name, **more: Any) -> Any:
            calls[_name] = dict(inspect.signature(_real).bind(*args, **more).arguments)
            return []

        monkeypatch.setattr(target, spy)
    monkeypatch.setattr("mmgraft.runs.results.put_aside", lambda *_: [])
    monkeypatch.setattr("mmgraft.runs.results.save_sets", lambda *_: None)
    monkeypatch.setattr("mmgraft.evaluation.identity.base_trained", lambda model: True)
    untouched = lambda model, run, name: SimpleNamespace(model=f"model of {name}")  # noqa: E731
    monkeypatch.setattr("mmgraft.evaluation.identity.untouched_base", untouched)
    monkeypatch.setattr("mmgraft.evaluation.origin.described_graft", lambda *_: {})
    return calls


def test_every_setting_reaches_its_part(called, tmp_path: Path) -> None:
    seen = SetSpec(name="seen", metric="choice", path="s.jsonl")
    text = SetSpec(name="text", metric="choice", modality="text", path="t.jsonl")
    exact = SetSpec(name="exact", metric="exact", path="e.jsonl")
    whole = Evaluation(
        run=tmp_path, specs=[seen, text, exact], text=True, vision=True, iit=True,
        tasks=("piqa", "boolq"), workflow="see", batch_size=3, limit=5,
        include_path=tmp_path / "tasks", dialogues=tmp_path / "saved", dialogue_count=9,
        untouched="old",
    )  # fmt: skip
    answerer: Any = SimpleNamespace(model="m", processor="p")
    list(evaluate_run(answerer, whole))
    shared = {"answerer": answerer, "run": tmp_path, "batch_size": 3}
    assert called["text"] == {**shared, "specs": [text], "untouched": "old"}
    assert called["vision"] == {**shared, "specs": [seen, exact], "workflow": "see"}
    assert called["iit"] == {
        **shared, "specs": [seen, text], "workflow": "see", "count": 9,
        "dialogues": tmp_path / "saved",
    }  # fmt: skip
    harness = called["tasks"]
    assert harness.pop("untouched") == "model of old"
    assert harness == {
        "answerer": answerer, "tasks": ["piqa", "boolq"], "workflow": "see", "limit": 5,
        "include_path": tmp_path / "tasks"  , "batch_size": 3,
    }  # fmt: skip


def test_what_is_not_said_is_left_to_each_part(called, tmp_path: Path) -> None:
    whole = Evaluation(run=tmp_path, specs=[], text=True, vision=True, iit=True)
    list(evaluate_run(SimpleNamespace(model="m", processor="p"), whole))
    for name in ("text", "vision", "iit"):
        assert "batch_size" not in called[name]
    assert "count" not in called["iit"]
    assert called["iit"]["dialogues"] is None


def test_kept_hands_on_all_that_it_is_given(
    folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def spy(model: Any, processor: Any, items: Any, **more: Any) -> None:
        asked.append({"model": model, **more})
        more["on_result"](range(len(items)), ["x"] * len(items))

    monkeypatch.setattr(kept, "_answer", spy)
    answerer = Answerer.load(run)
    store = Kept(answerer.model, answerer.processor, run, {"sha256": "0"}, batch_size=7)
    (read,) = read_sets([spec(folder)], "image")
    features: Any = object()
    assert store.answers("n", read.items, "mm", 5, features) == ["x"] * 8
    (call,) = asked
    assert call["model"] is answerer.model
    assert (call["workflow"], call["max_new_tokens"], call["batch_size"]) == ("mm", 5, 7)
    assert call["features"] is features
