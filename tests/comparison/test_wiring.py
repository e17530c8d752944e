"""Check that settings of an arm's evaluation reach what evaluates it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
    monkeypatch.setattr(runner.files, "write_phase", lambda *_: None)

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
    shared = {"untouched": "the/base", "base_cache": tmp_path / runner.files.BASE}
    assert calls["evaluate_text"] == ((*first, [text]), {**more, **shared})
    assert calls["evaluate_vision"] == ((*first, [seen]), more)
    assert calls["evaluate_iit"] == (first, {**more, "dialogues": tmp_path / "dialogues"})
    args, given = calls["evaluate_laws"]
    assert args == (answerer, ["items"], arm.run)
    assert given == {
        **more, "file": Path("l"), "features": "features",
        "settings": {"without": {"path", "images"}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("base", "precisions", "dtype"),
    [
        ("frozen", ["bf16", "bf16"], torch.bfloat16),
        ("frozen", ["bf16", "fp32"], torch.float32),
        ("frozen", ["fp32", "bf16"], torch.float32),
        ("full", ["bf16", "bf16"], torch.float32),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_features_are_as_precise_as_the_training_wants(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
    base,
    precisions,
    dtype,
    on_bad_row,
) -> None:
    seen: dict[str, Any] = {}
    read: list[Any] = []

    class Reader:
        def __init__(self, on_bad: str) -> None:
            assert on_bad == on_bad_row
            self.bad: list[Any] = []

        def rows(self, data: Any, seed: int, share: Any) -> list[Any]:
            read.append((data, seed, share))
            return []

    def load_tower(spec: Any, **more: Any) -> str:
        seen["tower"] = (spec, more)
        return "tower"

    def fill_cache(*args: Any, **more: Any) -> int:
        seen["filled"] = (args, more)
        return 3

    monkeypatch.setattr(runner, "StageData", Reader)
    monkeypatch.setattr(runner, "GraftFile", SimpleNamespace(read=lambda run: "record"))
    monkeypatch.setattr(runner, "local_tower", lambda record, run: (record, run))
    monkeypatch.setattr(runner, "load_tower", load_tower)
    monkeypatch.setattr(runner, "open_cache", lambda *args: SimpleNamespace(folder=args))
    monkeypatch.setattr(runner, "Joined", lambda parts: parts)
    monkeypatch.setattr(runner, "fill_cache", fill_cache)
    monkeypatch.setattr(runner, "default_workers", lambda device: f"workers on {device}")
    stages = [
        SimpleNamespace(precision=one, data=[one], image_share=at / 4)
        for at, one in enumerate(precisions)
    ]
    recipe = SimpleNamespace(
        base=base, stages=stages, feature_cache=str(tmp_path), on_bad_row=on_bad_row, seed=5
    )
    arm: Any = SimpleNamespace(name="a", run="run", recipe=recipe)
    runner.fill_features(arm, "mps")
    assert seen["tower"] == (("record", "run"), {"dtype": dtype, "device": "mps"})
    args, more = seen["filled"]
    assert args[0].folder == ("tower", tmp_path)
    assert args[1] == "tower"
    assert more == {"workers": "workers on mps", "bad": [] if on_bad_row == "skip" else None}
    assert read == [([one], 5, at / 4) for at, one in enumerate(precisions)]
    assert len(said) == 1
