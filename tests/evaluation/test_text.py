from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mmgraft.errors import UsageError
from mmgraft.evaluation import kept
from mmgraft.evaluation.identity import PROMPTS
from mmgraft.evaluation.items.files import read_items
from mmgraft.evaluation.kept import read_predictions
from mmgraft.evaluation.likelihood.likelihood import score_choices
from mmgraft.evaluation.likelihood.perplexity import measure_texts, score_texts
from mmgraft.evaluation.text import CHAT, EQUAL, evaluate_text
from mmgraft.inference import Answerer
from mmgraft.model.files.save import save_graft
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import read_results, write_results
from tiny_runs import make_parts, make_run

QUESTIONS = [
    ("Is there a dog?", "A. yes\nB. no", "A. yes"),
    ("What colour is the square?", "A. blue\nB. a circle\nC. red", "C. red"),
    ("How many images?", "A. one\nB. two", "B. two"),
]
TEXTS = ["The quick brown fox jumps over the lazy dog.", "No, there is a circle."]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_parts(tmp_path_factory.mktemp("parts"))
    rows = [
        {"question": f"{text} {at}", "options": options, "answer": answer, "kind": f"k{at % 2}"}
        for at in range(4)
        for text, options, answer in QUESTIONS
    ]
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in TEXTS))
    return folder


@pytest.fixture(scope="module")
def frozen(parts: Path) -> Path:
    """A graft whose base is frozen."""
    return make_run(parts, parts / "frozen", "iaa")


@pytest.fixture(scope="module")
def trained(parts: Path) -> Path:
    """A graft whose base was moved."""
    answerer = Answerer.load(make_run(parts, parts / "start", "llava"))
    torch.manual_seed(0)
    for parameter in answerer.model.base.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
        parameter.requires_grad_(True)
    save_graft(answerer.model, parts / "trained")
    return parts / "trained"


def _sets(parts: Path, **more: Any) -> list[SetSpec]:
    return [
        SetSpec(
            name="choice",
            metric="choice",
            modality="text",
            path=str(parts / "choice.jsonl"),
            **more,
        ),
        SetSpec(name="texts", metric="perplexity", path=str(parts / "texts.jsonl")),
    ]


def _evaluate(run: Path, specs: list[SetSpec], **settings: Any) -> Any:
    return evaluate_text(Answerer.load(run), run, specs, **settings)


def test_a_frozen_base_is_proved_and_measured_once(
    frozen: Path, parts: Path, said: list[str]
) -> None:
    results = _evaluate(frozen, _sets(parts))
    identity = results.identity
    assert identity["identical"] is True
    assert identity["prompts"] == len(PROMPTS) + 4 + 2
    assert identity["grafted"] == identity["base"]
    assert identity["base_trained"] is False
    assert len(identity["base_fingerprint"]) == len(identity["graft_sha256"]) == 64
    choice, texts = results.sets
    assert choice.settings["base"] == texts.settings["base"] == EQUAL
    assert choice.base == choice.scores
    for score in (*choice.change.values(), *texts.change.values(), texts.scores["kl_to_base"]):
        assert (score.value, score.low, score.high) == (0, 0, 0)
    assert texts.scores["kl_to_base"].count == 2
    assert set(choice.scores) == {"accuracy", "accuracy_per_token", "accuracy_per_character"}
    assert (choice.main, texts.main) == ("accuracy", "perplexity")
    assert set(choice.kinds) == {"k0", "k1"}
    assert choice.items == 12
    assert any("bit for bit" in one for one in said)
    write_results(frozen, results)
    assert read_results(frozen, "text") == results


def test_the_numbers_are_those_of_the_items(frozen: Path, parts: Path) -> None:
    (choice, _) = _evaluate(frozen, _sets(parts)).sets
    answerer = Answerer.load(frozen)
    items = read_items(_sets(parts)[0])
    found = score_choices(answerer.model, answerer.processor, items, chat=False)
    right = [one.prediction("token") == item.gold for one, item in zip(found, items, strict=True)]
    assert choice.scores["accuracy_per_token"].value == sum(right) / len(right)
    lines = read_predictions(frozen / choice.predictions)
    assert {line["id"] for line in lines} == {item.id for item in items}
    by_id = {line["id"]: line for line in lines}
    assert by_id["1"]["truth"] == ["yes"]
    assert by_id["1"]["sums"] == pytest.approx(found[0].sums)
    assert by_id["1"]["answer"] == items[0].options[found[0].prediction()]


def test_a_trained_base_is_compared_with_what_it_was(
    trained: Path, parts: Path, said: list[str]
) -> None:
    results = _evaluate(trained, _sets(parts))
    assert results.identity["identical"] is False
    assert results.identity["base_trained"] is True
    assert results.identity["max_difference"] > 0
    choice, texts = results.sets
    assert choice.settings["base"] == texts.settings["base"] == "measured"
    folder = trained / "results" / "predictions"
    said_by = [read_predictions(folder / f"choice{name}.jsonl") for name in ("", ".base")]
    answers = [{line["id"]: line["answer"] for line in lines} for lines in said_by]
    alike = sum(answers[0][name] == answers[1][name] for name in answers[0])
    assert choice.settings["same_option_as_base"] == alike / 12
    assert said_by[0] != said_by[1]
    assert texts.scores["kl_to_base"].value > 0.001
    assert "kl_to_base" not in texts.base
    change = texts.scores["perplexity"].value - texts.base["perplexity"].value
    assert texts.change["perplexity"].value == pytest.approx(change)
    assert change != 0
    assert any("not the base's" in one for one in said)
    base = _evaluate(make_run(parts, parts / "again", "llava"), _sets(parts)).sets
    assert base[1].scores["perplexity"].value == pytest.approx(texts.base["perplexity"].value)
    assert base[0].scores["accuracy"].value == choice.base["accuracy"].value


def test_a_trained_base_whose_original_is_gone_is_measured_alone(
    trained: Path, parts: Path, tmp_path: Path, said: list[str]
) -> None:
    run = tmp_path / "run"
    answerer = Answerer.load(trained)
    answerer.model.workflow().record.trained_from = None
    save_graft(answerer.model, run)
    results = _evaluate(run, _sets(parts))
    assert results.identity is None
    assert any("cannot be compared" in one for one in said)
    for found in results.sets:
        assert (found.base, found.change, found.settings["base"]) == ({}, {}, "not there")
        assert "kl_to_base" not in found.scores
    named = _evaluate(run, _sets(parts), untouched=parts / "base")
    assert named.sets[1].scores["kl_to_base"].value > 0.001


def _chats(parts: Path) -> list[SetSpec]:
    path = str(parts / "choice.jsonl")
    return [
        SetSpec(name="choice-chat", metric="choice", modality="text", chat=True, path=path),
        SetSpec(name="answers", metric="perplexity", chat=True, path=path),
    ]


def test_chats_are_asked_through_the_template_of_both(
    frozen: Path, trained: Path, parts: Path
) -> None:
    """The base reads the same ids, and a frozen one is asked once."""
    choice, answers = _evaluate(trained, _chats(parts)).sets
    assert choice.settings["asked"] == answers.settings["asked"] == CHAT
    assert choice.settings["prompt"] == answers.settings["prompt"] == "{question}"
    answerer = Answerer.load(trained)
    items = read_items(_chats(parts)[0])
    found = score_choices(answerer.model, answerer.processor, items, workflow="text")
    lines = read_predictions(trained / choice.predictions)
    assert {one["id"]: one["sums"] for one in lines} == {
        one.id: pytest.approx(list(one.sums), abs=1e-5) for one in found
    }
    untouched = Answerer.load(frozen).model.base
    theirs = measure_texts(
        score_texts(untouched, answerer.processor, read_items(_chats(parts)[1]), chat=True)
    )[0].values()
    assert answers.base["perplexity"].value == pytest.approx(theirs["perplexity"], rel=1e-5)
    assert answers.scores["kl_to_base"].value > 0.001
    assert answers.scores["perplexity"].count == 12
    same = _evaluate(frozen, _chats(parts)).sets
    assert [one.settings["base"] for one in same] == [EQUAL, EQUAL]
    assert same[0].scores["accuracy"].value == choice.base["accuracy"].value
    assert same[1].scores["kl_to_base"].value == 0


def test_a_set_added_later_leaves_those_before_as_they_were(
    trained: Path, parts: Path, monkeypatch: Any
) -> None:
    before = _evaluate(trained, _sets(parts)).sets
    asked: list[str] = []
    for name in ("score_choices", "score_texts"):
        real = getattr(kept, name)

        def counting(*given: Any, real: Any = real, name: str = name, **settings: Any) -> Any:
            if given[2] and not settings["chat"]:
                asked.append(name)
            return real(*given, **settings)

        monkeypatch.setattr(kept, name, counting)
    after = _evaluate(trained, [*_sets(parts), *_chats(parts)]).sets
    assert [one.scores for one in after[:2]] == [one.scores for one in before]
    assert not asked, "what was asked before was asked again"


def test_another_answer_of_a_chat_is_asked_anew(trained: Path, parts: Path, tmp_path: Path) -> None:
    rows = [{"question": f"Is there {at}", "answer": "a dog"} for at in range(3)]
    path = tmp_path / "chats.jsonl"
    spec = SetSpec(name="anew", metric="perplexity", chat=True, path=str(path))
    scores = []
    for answer in ("a dog", "the lazy circle"):
        rows[1]["answer"] = answer
        path.write_text("\n".join(map(json.dumps, rows)))
        scores.append(_evaluate(trained, [spec]).sets[0].scores["perplexity"].value)
    assert scores[0] != scores[1]


def test_turns_before_the_question_need_a_chat(trained: Path, tmp_path: Path) -> None:
    turns = [{"role": role, "content": "yes"} for role in ("user", "assistant") * 2]
    path = tmp_path / "turns.jsonl"
    path.write_text(json.dumps({"messages": turns, "options": ["yes", "no"]}))
    plain = SetSpec(name="turns", metric="choice", modality="text", path=str(path))
    with pytest.raises(UsageError, match="chat: true"):
        _evaluate(trained, [plain])
    (found,) = _evaluate(trained, [plain.model_copy(update={"chat": True})]).sets
    assert found.items == 1


def test_another_base_than_the_recorded_one_is_refused(trained: Path, frozen: Path) -> None:
    with pytest.raises(UsageError, match="not the base that this graft was made for"):
        _evaluate(frozen, [], untouched=trained / "base")


def test_the_base_is_asked_once_for_all_grafts_on_it(
    frozen: Path, trained: Path, parts: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    alone = [_evaluate(run, _sets(parts)).sets for run in (frozen, trained)]
    for run in (frozen, trained):
        for file in (run / "results" / "predictions").glob("*.jsonl"):
            file.unlink()
    asked: list[tuple[str, int]] = []
    real = kept.score_choices

    def counting(model: Any, processor: Any, items: Any, **settings: Any) -> Any:
        asked.append((type(model).__name__, len(items)))
        return real(model, processor, items, **settings)

    monkeypatch.setattr(kept, "score_choices", counting)
    cache = tmp_path / "base"
    first = _evaluate(frozen, _sets(parts), base_cache=cache).sets
    second = _evaluate(trained, _sets(parts), base_cache=cache).sets
    assert [one for one in asked if one[1]] == [("LlamaForCausalLM", 12), ("GraftedModel", 12)]
    for found, expected in ((first, alone[0]), (second, alone[1])):
        for one, other in zip(found, expected, strict=True):
            for name, score in one.scores.items():
                assert score.value == pytest.approx(other.scores[name].value, abs=1e-5)
    assert (frozen / first[0].predictions).is_file()


def test_a_second_run_asks_nothing_again(frozen: Path, parts: Path, monkeypatch: Any) -> None:
    before = _evaluate(frozen, _sets(parts))

    def never(model: Any, processor: Any, items: Any, **settings: Any) -> None:
        assert not items, "asked again"

    monkeypatch.setattr(kept, "score_choices", never)
    after = _evaluate(frozen, _sets(parts))
    assert [one.scores for one in after.sets] == [one.scores for one in before.sets]


def test_what_an_earlier_version_began_is_read(trained: Path, frozen: Path, parts: Path) -> None:
    """Sets of text are told apart by these first lines since they are kept."""
    for run, name, beside in ((frozen, "choice", False), (trained, "texts", True)):
        results = _evaluate(run, _sets(parts))
        path = run / "results/predictions" / f"{name}.jsonl"
        first = json.loads(path.read_text().splitlines()[0])
        identity = results.identity
        base = {"base": identity["base_fingerprint"]} if beside else {}
        letters = {"letters": False} if name == "choice" else {}
        assert first == {
            "mmgraft_predictions": 1,
            "graft": results.graft["sha256"],
            **base,
            "set": first["set"],
            "settings": {"workflow": "text", **letters, "dtype": "float32"},
        }


def test_a_half_written_file_is_gone_on_from(frozen: Path, parts: Path) -> None:
    before = _evaluate(frozen, _sets(parts))
    for found in before.sets:
        path = frozen / found.predictions
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    after = _evaluate(frozen, _sets(parts))
    for one, other in zip(before.sets, after.sets, strict=True):
        for name, score in one.scores.items():
            assert score.value == pytest.approx(other.scores[name].value, abs=1e-5)


def test_another_prompt_is_asked_anew(frozen: Path, parts: Path, said: list[str]) -> None:
    _evaluate(frozen, _sets(parts))
    shown = _evaluate(frozen, _sets(parts, prompt="{question}\n{options}\nAnswer:")).sets[0]
    assert any("stale" in one for one in said)
    assert shown.settings["scored"] == "letters"
    line = read_predictions(frozen / shown.predictions)[0]
    assert set(line["characters"]) == {1}


def test_a_base_that_is_not_quite_equal_is_measured(
    frozen: Path, parts: Path, monkeypatch: Any
) -> None:
    """Ask a set of both models where equal prompts hide unequal texts."""
    real = kept.Kept.compared

    def off(self: Any, items: Any, chat: bool) -> Any:
        from dataclasses import replace

        scores = real(self, items, chat)
        return [
            replace(one, windows=tuple(replace(w, kl=0.5) for w in one.windows)) for one in scores
        ]

    monkeypatch.setattr(kept.Kept, "compared", off)
    texts = _evaluate(frozen, _sets(parts)[1:]).sets[0]
    assert texts.settings["base"] == "measured"
    assert texts.scores["kl_to_base"].value == 0


def test_an_always_right_and_a_random_reader_score_what_they_must(
    frozen: Path, tmp_path: Path, parts: Path
) -> None:
    """Through the whole path: the set's right options are made what the model likes best."""
    answerer = Answerer.load(frozen)
    items = read_items(_sets(parts)[0])
    scores = score_choices(answerer.model, answerer.processor, items, chat=False)
    for shift, expected in ((0, 1.0), (1, 0.0)):
        rows = [
            {
                "question": item.question,
                "options": list(item.options),
                "answer": (score.prediction() + shift) % len(item.options),
            }
            for item, score in zip(items, scores, strict=True)
        ]
        path = tmp_path / f"{shift}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        spec = SetSpec(name="right", metric="choice", modality="text", path=str(path))
        (found,) = _evaluate(frozen, [spec]).sets
        assert found.scores["accuracy"].value == expected


def test_sets_that_cannot_be_asked_are_refused_before_anything(frozen: Path, parts: Path) -> None:
    twice = _sets(parts)[:1] * 2
    with pytest.raises(UsageError, match="two sets are called 'choice'"):
        _evaluate(frozen, twice)
    images = SetSpec(name="seen", metric="exact", path="x.jsonl")
    with pytest.raises(UsageError, match="'seen' has images"):
        _evaluate(frozen, [images])
    assert _evaluate(frozen, []).sets == []


def test_perplexity_is_finite_and_by_token(frozen: Path, parts: Path) -> None:
    (texts,) = _evaluate(frozen, _sets(parts)[1:]).sets
    answerer = Answerer.load(frozen)
    tokens = sum(len(answerer.processor.tokenizer(one)["input_ids"]) for one in TEXTS)
    assert texts.settings["tokens"] == tokens
    lines = read_predictions(frozen / texts.predictions)
    total = sum(window[1] for line in lines for window in line["windows"])
    assert texts.scores["perplexity"].value == pytest.approx(math.exp(-total / tokens))
