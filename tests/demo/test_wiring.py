"""Check that the demo's settings reach its rows, its training and its intervals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmgraft.demo import run as demo_run
from mmgraft.demo.run import DemoSettings, _Demo, _score


@pytest.fixture
def demo(tmp_path: Path) -> _Demo:
    settings = DemoSettings("iaa", tmp_path / "out", seed=7, images=3, max_steps=5)
    return _Demo(settings, lambda *_: ())


def test_the_training_has_the_demos_seed_and_steps(
    demo: _Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    plan = SimpleNamespace(stages=[SimpleNamespace(name="tune")])
    monkeypatch.setattr(
        demo_run, "plan_training", lambda run, **more: asked.append((run, more)) or plan
    )
    monkeypatch.setattr(demo_run, "train", lambda *_, **__: [])
    demo._train({"align": tmp_path / "a", "tune": tmp_path / "t"}, tmp_path)
    assert asked == [
        (
            tmp_path / "out",
            {
                "data": [f"align={tmp_path / 'a'}", f"tune={tmp_path / 't'}"],
                "images": str(tmp_path), "overrides": ["seed=7"], "max_steps": 5,
                "device": demo.device,
            },
        )
    ]  # fmt: skip


def test_the_rows_are_of_the_first_images_and_drawn_by_the_seed(
    demo: _Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def questions(found: Any, **more: Any) -> list[Any]:
        seen.update(more, numbers=[one.number for one in found])
        return []

    monkeypatch.setattr(demo_run.easy_vqa, "question_rows", questions)
    monkeypatch.setattr(demo_run.easy_vqa, "caption_rows", lambda found: [])
    monkeypatch.setattr(demo_run, "write_rows", lambda rows, file: None)
    demo._write_rows([SimpleNamespace(number=number) for number in (0, 2, 3, 5)])  # type: ignore
    assert seen == {"seed": 7, "numbers": [0, 2]}


def test_questions_about_one_image_are_drawn_together() -> None:
    asked: Any = [
        SimpleNamespace(number=at // 3, kind="ab"[at % 2], answer="yes") for at in range(6)
    ]
    score = _score(asked, ["yes", "no"] * 3)
    assert (score.overall.count, score.overall.groups, score.overall.value) == (6, 2, 0.5)
    assert score.kinds == {"a": 1.0, "b": 0.0}
