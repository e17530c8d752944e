"""A run with a tower whose images differ in length: trained, estimated, checked and evaluated."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mmgraft.data.checking import Checker
from mmgraft.data.formats.sources import read_rows
from mmgraft.evaluation.vision import evaluate_vision
from mmgraft.grafts.registry import get_method
from mmgraft.inference import Answerer
from mmgraft.model.files.create import create_graft
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.training.callbacks.stopping import TrainingStopped
from mmgraft.training.memory.request import read_request
from mmgraft.training.run import plan_training, train
from mmgraft.vision.projectors.configs import (
    MlpConfig,
    PerceiverConfig,
    PoolConfig,
    QFormerConfig,
)
from sized_tower import plan, sized_tower
from tiny import save_base
from tiny_runs import CONFIGS, losses, write_recipe
from tiny_towers import picture

SIZES = [(40, 24), (9, 60), (8, 8), (24, 40)]
RESAMPLERS = [
    PerceiverConfig(latents=3, layers=2, heads=2, head_dim=4, per="view"),
    PerceiverConfig(form="idefics2", latents=2, layers=1, heads=2, kv_heads=1),
    QFormerConfig(queries=2, width=8, layers=2, heads=2, hidden=8),
]
every_resampler = pytest.mark.parametrize(
    "projector", RESAMPLERS, ids=["flamingo", "idefics2", "qformer"]
)
STAGE = {"name": "tune", "train": ["projector", "graft"], "lr": 1e-2, "batch_size": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and rows with images of four sizes, some with two images."""
    folder = tmp_path_factory.mktemp("sized")
    save_base(folder / "base", "llama")
    (folder / "images").mkdir()
    lines, items = [], []
    for number, size in enumerate(SIZES):
        picture(*size, which=number % 2).save(folder / "images" / f"{number}.png")
        shown = [number, (number + 1) % 4][: 1 + number % 2]
        content: list[Any] = [{"type": "image", "image": f"{one}.png"} for one in shown]
        content.append({"type": "text", "text": "what" + " now" * number})
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
        lines.append(json.dumps({"id": str(number), "messages": turns}))
        item = {"id": f"n{number}", "image": f"{number}.png", "question": "which?"}
        items.append(json.dumps({**item, "options": ["red", "blue"], "answer": "red"}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "items.jsonl").write_text("\n".join(items) + "\n")
    return folder


def make(parts: Path, run: Path, method: str = "iaa", projector: Any = None, **recipe: Any) -> Path:
    tower = sized_tower()
    config = get_method(method).config_class.model_validate(CONFIGS[method])
    create_graft(str(parts / "base"), tower.spec, config, run, projector=projector or MlpConfig())
    write_recipe(
        run, parts, method, [{**STAGE, "max_steps": 3, **recipe.pop("stage", {})}], **recipe
    )
    return run


def run_losses(run: Path) -> list[float]:
    train(plan_training(run))
    return [loss for *_, loss in losses(run)]


def test_a_feature_cache_changes_no_loss(parts: Path, tmp_path: Path) -> None:
    plain = run_losses(make(parts, tmp_path / "plain"))
    cached = run_losses(make(parts, tmp_path / "cached", feature_cache=True))
    assert len(plain) == 3
    assert cached == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "projector"),
    [("iaa", None), ("wings", None), ("lora", RESAMPLERS[0]), ("iaa", RESAMPLERS[1])],
    ids=str,
)
def test_packing_learns_what_padding_learns(
    parts: Path, tmp_path: Path, method: str, projector: Any
) -> None:
    """All four rows in one step: in sequences of two, or of two rows each."""
    whole = {"batch_size": 4, "max_steps": 1}
    packed = {"batch_size": 4, "max_steps": 1, "packing": True, "max_length": 96}
    one = run_losses(make(parts, tmp_path / "padded", method, projector, stage=whole))
    other = run_losses(make(parts, tmp_path / "packed", method, projector, stage=packed))
    assert other == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("method", ["llava", "iaa", "wings", "lora"])
@every_resampler
def test_every_tensor_of_a_resampler_learns_with_every_method(
    parts: Path, tmp_path: Path, method: str, projector: Any
) -> None:
    stage = {"train": ["projector"], "gradient_checkpointing": True, "max_steps": 2}
    run = make(parts, tmp_path / "run", method, projector, stage=stage)
    fresh = load_file(run / "graft.safetensors")
    train(plan_training(run))
    for name, tensor in load_file(run / "graft.safetensors").items():
        learned = name.startswith("projector.") and not name.endswith(
            "key.bias"
        )  # softmax drops it
        assert learned != torch.equal(tensor, fresh[name]) or name.endswith("key.bias"), name


class CtrlC(TrainerCallback):
    """Presses it in the third step."""

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


@every_resampler
def test_a_stopped_run_of_a_resampler_goes_on_to_the_bit(
    parts: Path, tmp_path: Path, projector: Any
) -> None:
    whole, stopped = (
        make(parts, tmp_path / name, "lora", projector, stage={"max_steps": 5}, save_every=1)
        for name in ("whole", "stopped")
    )
    train(plan_training(whole))
    with pytest.raises(TrainingStopped):
        train(plan_training(stopped), display=lambda *_: [CtrlC()])
    train(plan_training(stopped, resume=True))
    assert losses(stopped) == losses(whole)
    one, other = (load_file(run / "graft.safetensors") for run in (whole, stopped))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize("projector", [PoolConfig(), *RESAMPLERS], ids=lambda one: one.kind)
def test_rows_are_checked_and_estimated_by_their_own_lengths(
    parts: Path, tmp_path: Path, projector: Any
) -> None:
    run = make(parts, tmp_path / "run", projector=projector)
    processor = Answerer.load(run).processor
    rows = read_rows(parts / "rows.jsonl", parts / "images")
    counts = [projector.counts(plan(size)) for size in SIZES]
    wanted = counts[0] + counts[1] + counts[2] + counts[2] + counts[3] + counts[0]
    report = Checker(processor).check(rows)
    assert not report.bad
    assert report.image_positions == wanted
    request = read_request(run, device="cpu")
    (estimate,) = request.stages()
    assert estimate.rows.sizes == (SIZES[3], SIZES[0])
    stored = load_file(run / "graft.safetensors").values()
    assert estimate.trained == sum(tensor.numel() for tensor in stored)
    assert estimate.activations > 0


def test_a_set_is_evaluated_with_features_as_with_pixels(parts: Path, tmp_path: Path) -> None:
    run = make(parts, tmp_path / "run")
    values = {"name": "set", "metric": "exact", "path": str(parts / "items.jsonl")}
    spec = SetSpec.model_validate({**values, "images": str(parts / "images")})
    other = Path(shutil.copytree(run, tmp_path / "other"))
    found = evaluate_vision(Answerer.load(run), run, [spec], batch_size=3)
    alone = evaluate_vision(Answerer.load(other), other, [spec], batch_size=1)
    assert found.sets[0].scores == alone.sets[0].scores
    answers = [(folder / "results").rglob("*.jsonl") for folder in (run, other)]
    first, second = (sorted(path.read_text() for path in each) for each in answers)
    assert first == second
