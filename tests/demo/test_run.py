from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mmgraft.data.formats.sources import read_rows
from mmgraft.demo import run as demo_run
from mmgraft.demo.run import DemoSettings, run_demo
from mmgraft.errors import UsageError
from mmgraft.inference import Answerer
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.recipes.source import load_recipe


@pytest.fixture
def settings(tmp_path: Path, tiny_recipe: Path, tiny_data: Path) -> DemoSettings:
    return DemoSettings("iaa", tmp_path / "out", questions=16, recipe=tiny_recipe)


def test_the_whole_job(
    settings: DemoSettings, tiny_models, tiny_data: Path, said: list[str], monkeypatch
) -> None:
    asked_with: list[float] = []
    monkeypatch.setattr(demo_run, "answer", _spy(demo_run.answer, asked_with))
    clock = itertools.count().__next__
    monkeypatch.setattr(demo_run, "time", SimpleNamespace(monotonic=clock, process_time=clock))
    report = run_demo(settings, models=tiny_models)

    # What was asked before training was the fresh graft, and after it the trained one.
    assert asked_with[0] != asked_with[1]
    trained = Answerer.load(settings.out).model
    assert asked_with[1] == _sum_of(trained)
    assert report.identity.identical
    assert report.questions == 16
    assert report.question_only.overall.count == report.after.overall.count == 16
    assert report.question_only.kinds["shape"] == 1.0  # every tiny shape is a circle
    assert report.steps == {"align": 3, "tune": 3}
    workflow = trained.workflow()
    own = sum(p.numel() for p in workflow.parameters())
    assert report.parameters == own, "projector, layers and norm are all there is"
    assert report.base_parameters == sum(p.numel() for p in trained.base.parameters())

    # The clock: every phase is there, told as it ends, and together they are the whole.
    names = [phase.name for phase in report.phases]
    assert names == [
        "data", "models", "graft", "before training", "training: align", "training: tune",
        "after training", "text compared", "chat and images",
    ]  # fmt: skip
    assert sum(phase.seconds for phase in report.phases) == pytest.approx(report.seconds)
    assert {phase.seconds for phase in report.phases} == {2}  # each begins where one ended
    assert report.seconds == report.cpu_seconds == 2 * len(report.phases)
    assert 0 < report.cpu_seconds < 1000
    assert all(any(line.startswith(f"{name}: ") for line in said) for name in names)

    # What is left behind.
    assert json.loads((settings.out / "results/demo.json").read_text()) == report.as_dict()
    with Image.open(report.sheet) as sheet:
        assert sheet.format == "PNG"
    record = GraftFile.read(settings.out)
    assert record.results == report.results()
    assert record.results["text logits identical to the base"] == "yes"
    assert record.recipe is not None
    assert record.recipe["name"] == "tiny-demo"
    assert [turn.image is not None for turn in report.chat] == [True, False, False]
    captions = read_rows(settings.out / "data/align.jsonl", tiny_data)
    assert len(captions) == 12
    assert all(row.has_image for row in read_rows(settings.out / "data/tune.jsonl", tiny_data))


def _sum_of(model) -> float:
    return sum(p.double().abs().sum().item() for p in model.workflow().parameters())


def _spy(real, seen: list[float]):
    def answer(model, *args, **kwargs):
        seen.append(_sum_of(model))
        return real(model, *args, **kwargs)

    return answer


def test_the_seed_decides_the_graft_and_not_the_questions(
    settings: DemoSettings, tiny_models, tmp_path: Path, monkeypatch
) -> None:
    asked: list[object] = []
    real = demo_run.answer

    def answer(model, processor, conversations, **kwargs):
        asked.append(conversations)
        return real(model, processor, conversations, **kwargs)

    monkeypatch.setattr(demo_run, "answer", answer)
    sums = []
    for out, seed in (("one", 1), ("again", 1), ("two", 2)):
        run_demo(replace(settings, out=tmp_path / out, seed=seed), models=tiny_models)
        sums.append(_sum_of(Answerer.load(tmp_path / out).model))
    assert sums[0] == sums[1]
    assert sums[0] != sums[2]
    assert all(conversations == asked[0] for conversations in asked)


def test_a_text_that_changed_is_reported(settings: DemoSettings, tiny_models, monkeypatch) -> None:
    real = demo_run.load_untouched

    def touched(*args):
        base, tokenizer = real(*args)
        with torch.no_grad():
            base.get_input_embeddings().weight[:].mul_(1.5)
        return base, tokenizer

    monkeypatch.setattr(demo_run, "load_untouched", touched)
    report = run_demo(settings, models=tiny_models)
    assert not report.identity.identical
    assert report.results()["text logits identical to the base"] == "no"


def test_quick_runs_every_phase_and_little_of_it(
    settings: DemoSettings, tiny_models, tiny_data: Path
) -> None:
    quick = replace(DemoSettings.quick("iaa", settings.out), recipe=settings.recipe, images=5)
    report = run_demo(quick, models=tiny_models)
    assert report.questions == 20
    assert report.steps == {"align": 2, "tune": 2}
    assert len(read_rows(settings.out / "data/align.jsonl", tiny_data)) == 5


@pytest.mark.parametrize("method", demo_run.demo_methods())
def test_the_shipped_recipes_have_the_demos_stages(method: str) -> None:
    recipe = load_recipe(f"demo-{method}", method=method)
    assert [stage.name for stage in recipe.stages] == [demo_run.ALIGN, demo_run.TUNE]
    assert recipe.feature_cache is True


def test_a_folder_that_is_not_empty_is_left_alone(settings: DemoSettings, tiny_models) -> None:
    settings.out.mkdir()
    (settings.out / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run_demo(settings, models=tiny_models)
    assert [path.name for path in settings.out.iterdir()] == ["mine.txt"]


def test_an_unknown_method_is_refused_before_anything_is_written(settings: DemoSettings) -> None:
    with pytest.raises(UsageError, match="choose expert, iaa, llava, lora, wings, xattn"):
        run_demo(replace(settings, method="peft"))
    assert not settings.out.exists()
