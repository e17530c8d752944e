from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmgraft.errors import UsageError
from mmgraft.evaluation.evaluate import Evaluation, check, evaluate_run
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import Results, Score, SetResult, read_results

TEXT = SetSpec(name="facts", metric="choice", modality="text")
SEEN = SetSpec(name="seen", metric="exact")


@pytest.mark.parametrize(
    ("specs", "parts", "found"),
    [
        ([TEXT], {}, (True, False)),
        ([SEEN], {}, (False, True)),
        ([TEXT, SEEN], {}, (True, True)),
        ([TEXT, SEEN], {"iit": True}, (False, False)),
        ([SEEN], {"text": True}, (True, False)),
    ],
)
def test_sets_bring_their_parts_where_none_is_named(
    specs: list[SetSpec], parts: dict[str, bool], found: tuple[bool, bool]
) -> None:
    evaluation = Evaluation(Path(), specs, **parts).with_parts_of_sets()
    assert (evaluation.text, evaluation.vision) == found


def test_a_missing_harness_is_said_before_a_model_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr("mmgraft.evaluation.lm_eval.harness.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'mmgraft\[eval\]'"):
        check(Evaluation(Path(), tasks=["hellaswag"]))


def test_each_part_is_on_the_disk_before_the_next_begins(tmp_path: Path, monkeypatch) -> None:
    """A part that fails costs none of those before it."""

    def part(section: str) -> Any:
        return lambda *_, **__: Results(section=section, mmgraft_version="1")  # type: ignore[arg-type]

    def fail(*_: Any, **__: Any) -> Any:
        assert read_results(tmp_path, "text") is not None
        raise UsageError("no such set; name another")

    monkeypatch.setattr("mmgraft.evaluation.text.evaluate_text", part("text"))
    monkeypatch.setattr("mmgraft.evaluation.vision.evaluate_vision", fail)
    evaluation = Evaluation(tmp_path, text=True, vision=True)
    answerer: Any = SimpleNamespace()
    parts = evaluate_run(answerer, evaluation)
    assert next(parts).section == "text"
    with pytest.raises(UsageError, match="no such set"):
        next(parts)
    assert read_results(tmp_path, "vision") is None


@pytest.mark.parametrize("trained", [False, True])
def test_tasks_are_asked_of_the_untouched_base_where_the_base_was_trained(
    tmp_path: Path, monkeypatch, trained: bool
) -> None:
    """A frozen base answers as the graft does; asking it again would only cost time."""
    given: list[Any] = []

    def ask(*_: Any, untouched: Any, **__: Any) -> list[Any]:
        given.append(untouched)
        return [one]

    one = SetResult(
        name="piqa", metric="acc", main="acc", file="f", sha256="s", items=1,
        scores={"acc": Score(value=1, low=1, high=1, count=1)}, settings={"workflow": "text"},
    )  # fmt: skip

    base = SimpleNamespace(model="the base")
    monkeypatch.setattr("mmgraft.evaluation.lm_eval.harness.evaluate_harness", ask)
    monkeypatch.setattr("mmgraft.evaluation.identity.base_trained", lambda _: trained)
    monkeypatch.setattr("mmgraft.evaluation.identity.untouched_base", lambda *_: base)
    monkeypatch.setattr("mmgraft.evaluation.origin.weights_sha256", lambda _: "a")
    record = SimpleNamespace(
        method="iaa", base=SimpleNamespace(id="base"), vision=SimpleNamespace(name="tower")
    )
    graft = {None: SimpleNamespace(name="mm", record=record)}  # `text` is none of a model's
    answerer: Any = SimpleNamespace(model=SimpleNamespace(workflow=graft.__getitem__))
    (found,) = evaluate_run(answerer, Evaluation(tmp_path, tasks=["piqa"], workflow="text"))
    assert found.graft["workflow"] == "mm", "what stands in the section is the graft"
    assert given == ["the base" if trained else None]
