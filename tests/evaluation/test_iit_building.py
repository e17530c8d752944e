from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmgraft.errors import UsageError
from mmgraft.evaluation.dialogues import evaluate as build
from mmgraft.evaluation.dialogues.evaluate import build_iit, question_vectors
from mmgraft.inference import Answerer
from tiny_choice import choice_sets
from tiny_runs import make_parts, make_run


@pytest.fixture(scope="module")
def answerer(tmp_path_factory) -> Answerer:
    parts = make_parts(tmp_path_factory.mktemp("parts"))
    return Answerer.load(make_run(parts, parts / "run", "iaa"))


@pytest.fixture
def by_letters(monkeypatch) -> list[int]:
    """Vectors without a model; gives how many questions each call had."""
    calls: list[int] = []

    def vectors(answerer, texts) -> np.ndarray:
        calls.append(len(texts))
        return letters(texts)

    monkeypatch.setattr(build, "question_vectors", vectors)
    return calls


def letters(texts) -> np.ndarray:
    """A meaning without a model: how often each letter occurs."""
    return np.array([[text.count(chr(97 + at)) for at in range(26)] for text in texts], float)


def test_a_vector_is_the_mean_of_the_bases_last_states(answerer) -> None:
    """Whatever is beside it in the batch; the questions are of different lengths."""
    questions = ["what?", "which colour has the stone in the picture?", "is it hard?", ""]
    found = question_vectors(answerer, questions)
    for question, vector in zip(questions, found, strict=True):
        ids = answerer.processor.tokenizer(question or " ", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = answerer.model.base(input_ids=ids, output_hidden_states=True)
        mean = out.hidden_states[-1][0].mean(0).numpy()
        np.testing.assert_allclose(vector, mean, atol=1e-5)


def test_dialogues_are_built_once_and_again_when_something_differs(
    answerer, by_letters, tmp_path: Path
) -> None:
    specs = choice_sets(tmp_path)
    calls = by_letters

    def make(**settings):
        return build_iit(answerer, specs, tmp_path / "iit", **settings)

    first = make(count=2)
    assert calls == [9, 4]
    assert {shape: len(items) for shape, items in first.items()} == {
        "T": 2, "TT": 2, "TTT": 2, "TTV": 2, "TV": 2, "V": 2
    }  # fmt: skip
    text = (tmp_path / "iit/dialogues.jsonl").read_bytes()
    make(count=2)
    assert calls == [9, 4], "the saved ones are taken"
    assert (tmp_path / "iit/dialogues.jsonl").read_bytes() == text
    make(count=2, seed=1)
    assert len(calls) == 4
    assert (tmp_path / "iit/dialogues.jsonl").read_bytes() != text
    make(count=2)
    assert (tmp_path / "iit/dialogues.jsonl").read_bytes() == text
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write('{"id": "more", "question": "new?", "options": ["a", "b"], "answer": "A"}\n')
    make(count=2)
    assert calls[-2:] == [10, 4], "the sets have changed"


def test_the_base_itself_gives_the_same_dialogues_again(answerer, tmp_path: Path) -> None:
    specs = choice_sets(tmp_path)
    for name in ("one", "two"):
        build_iit(answerer, specs, tmp_path / name, count=3)
    assert _rows(tmp_path / "one") == _rows(tmp_path / "two")


def _rows(folder: Path) -> bytes:
    return (folder / "dialogues.jsonl").read_bytes()


def test_each_set_is_asked_as_it_asks_and_letters_answer_where_they_are_shown(
    answerer, by_letters, tmp_path: Path
) -> None:
    text, seen = choice_sets(tmp_path)
    text = text.model_copy(update={"prompt": "{question}\n{options}"})

    def built(name: str, *shapes: str):
        folder = tmp_path / name
        return build_iit(answerer, [text, seen], folder, shapes=shapes, count=1)

    (item,) = built("seen", "TV")["TV"]
    assert [turn["role"] for turn in item.messages] == ["user", "assistant", "user"]
    assert item.messages[0]["content"].endswith("?\nA. yes\nB. no\nC. or so")
    assert item.messages[1]["content"] in ("A", "B", "C")
    assert item.messages[2]["content"][-1]["text"].endswith("?")
    assert item.options == ("blue", "green", "red")
    (alone,) = built("alone", "T")["T"]
    right = {row["id"]: row["answer"] for row in map(json.loads, (tmp_path / "text.jsonl").open())}
    (row,) = map(json.loads, (tmp_path / "alone/dialogues.jsonl").open())
    assert alone.options == ("A", "B", "C")
    assert alone.gold == right[row["from"][0]["id"]]


def test_questions_too_long_for_a_dialogue_are_left_out(
    answerer, by_letters, tmp_path: Path, said: list[str]
) -> None:
    """Three with their answers must fit into the 128 positions that the base reads."""
    specs = choice_sets(tmp_path)
    long = {"id": "long", "question": "w" * 60, "options": ["a", "b"], "answer": 0}
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    build_iit(answerer, specs, tmp_path / "iit", count=3)
    assert said[0].endswith(
        "text.jsonl: 1 of 10 questions are left out, which are longer than 42 positions, a "
        "dialogue's part of what the base reads"
    )
    rows = [json.loads(line) for line in _rows(tmp_path / "iit").decode().splitlines()]
    used = [part["id"] for row in rows for part in row["from"]]
    assert "t0" in used
    assert "long" not in used
    build_iit(answerer, specs, tmp_path / "one", shapes=["T"], count=10)
    assert b'"long"' in _rows(tmp_path / "one"), "alone it fits"


def test_shapes_that_the_sets_do_not_give_are_announced(
    answerer, by_letters, tmp_path: Path, said: list[str]
) -> None:
    found = build_iit(answerer, choice_sets(tmp_path)[:1], tmp_path / "iit")
    assert list(found) == ["T", "TT", "TTT"]
    assert said[0] == ("no dialogues (T,T,V), (T,V), (V): there are 9 text and 0 visual questions")
    assert said[1].startswith("built 9 dialogues in ")
    with pytest.raises(UsageError, match=r"\(V\) has 1 visual questions, and there are 0"):
        build_iit(answerer, choice_sets(tmp_path)[:1], tmp_path / "x", shapes=["V"])
    assert not (tmp_path / "x").exists()


def test_a_multiple_choice_set_is_needed(answerer, tmp_path: Path) -> None:
    spec = choice_sets(tmp_path)[1].model_copy(update={"metric": "exact"})
    with pytest.raises(UsageError, match=r"no multiple-choice set.*metric: choice"):
        build_iit(answerer, [spec], tmp_path / "iit")
