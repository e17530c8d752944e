"""What a comparison says of an arm's evaluation reaches what evaluates it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmgraft.comparison import runner
from mmgraft.comparison.runner import evaluate
from mmgraft.recipes.evaluation_set import SetSpec


@pytest.mark.parametrize("batch_size", [None, 7])
def test_an_arm_is_evaluated_as_the_comparison_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int | None
) -> None:
    asked: list[Any] = []
    loaded: list[Any] = []
    monkeypatch.setattr(runner, "evaluate", lambda *args, **more: asked.append((args, more)))
    monkeypatch.setattr(runner, "write_phase", lambda *_: None)

    def load(run: Path, **more: Any) -> str:
        loaded.append((run, more))
        return "answerer"

    monkeypatch.setattr(runner.Answerer, "load", load)
    plan: Any = SimpleNamespace(device="mps")
    arm: Any = SimpleNamespace(name="a", run=tmp_path)
    one = runner._Arm(plan, arm, batch_size)
    one._evaluate("text", {}, None)
    one._evaluate("vision", {}, None)
    assert loaded == [(tmp_path, {"device": "mps"})]
    more = {} if batch_size is None else {"batch_size": 7}
    assert asked == [((phase, "answerer", plan, arm), more) for phase in ("text", "vision")]


def test_each_part_has_its_sets_and_the_shared_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, tuple[Any, Any]] = {}
    for name in ("evaluate_text", "evaluate_vision", "evaluate_iit", "evaluate_laws"):
        monkeypatch.setattr(
            runner, name, lambda *args, _name=name, **more: calls.update({_name: (args, more)})
        )
    monkeypatch.setattr(runner, "write_results", lambda *_: None)
    monkeypatch.setattr(runner, "_dialogues", lambda *_: tmp_path / "dialogues")
    monkeypatch.setattr(runner, "read_items", lambda spec: [spec])
    monkeypatch.setattr(runner, "run_features", lambda *_: "features")
    text = SetSpec(name="t", metric="choice", modality="text", path="t")
    seen = SetSpec(name="v", metric="exact", path="v")
    laws = SimpleNamespace(
        path="l", items=lambda: "items", model_dump=lambda **given: {"without": given["exclude"]}
    )
    spec = SimpleNamespace(evaluation=[text, seen], laws=laws, iit=SimpleNamespace(path=None))
    plan: Any = SimpleNamespace(comparison=spec, out=tmp_path, base="the/base")
    arm: Any = SimpleNamespace(name="a", run=tmp_path / "run")
    answerer: Any = SimpleNamespace(model="m")
    more = {"batch_size": 3}
    for phase in ("text", "vision", "iit", "laws"):
        evaluate(phase, answerer, plan, arm, **more)
    first = (answerer, arm.run)
    shared = {"untouched": "the/base", "base_cache": tmp_path / runner.BASE}
    assert calls["evaluate_text"] == ((*first, [text]), {**more, **shared})
    assert calls["evaluate_vision"] == ((*first, [seen]), more)
    assert calls["evaluate_iit"] == (first, {**more, "dialogues": tmp_path / "dialogues"})
    args, given = calls["evaluate_laws"]
    assert args == (answerer, ["items"], arm.run)
    assert given == {
        **more, "file": Path("l"), "features": "features",
        "settings": {"without": {"path", "images"}},
    }  # fmt: skip
