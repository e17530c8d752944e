"""Check what a training is set to on a card."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mmgraft.recipes.recipe import Recipe
from mmgraft.training.devices import default_workers, slow_precision
from mmgraft.training.run import plan_training
from mmgraft.training.session import Session
from mmgraft.training.stages import open_stage
from mmgraft.training.trainer import training_arguments
from pretend_cuda import Card, pretend_cuda
from tiny_runs import make_parts, make_run, write_recipe

TUNE = {"name": "tune", "train": ["projector"], "lr": 1e-3, "batch_size": 2, "max_steps": 1}


def test_workers_are_there_for_a_card_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    run = make_run(make_parts(tmp_path), tmp_path / "run", "llava")
    write_recipe(run, tmp_path, "llava", [TUNE])
    assert plan_training(run, device="cpu").recipe.workers == 0
    with pretend_cuda():
        assert plan_training(run, device="cuda").recipe.workers == default_workers("cuda") == 4
        assert plan_training(run, device="cuda", overrides=["workers=1"]).recipe.workers == 1


def test_copies_and_steps_are_those_of_a_card(card: Card, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"name": "r", "method": "llava", "stages": [TUNE]}).resolved()
    recipe = recipe.model_copy(update={"workers": 2})
    arguments = training_arguments(recipe, recipe.stages[0], tmp_path, "cuda", "r")
    assert arguments.optim == "adamw_torch_fused"
    assert arguments.accelerator_config.non_blocking
    assert arguments.dataloader_pin_memory
    assert arguments.dataloader_persistent_workers


def test_ranks_hold_gradients_once_and_send_nothing_frozen(tmp_path: Path) -> None:
    run = make_run(make_parts(tmp_path), tmp_path / "run", "iaa")
    write_recipe(run, tmp_path, "iaa", [{**TUNE, "train": ["projector", "graft"]}])
    plan = plan_training(run, device="cpu")
    session = Session(plan, lambda text: None)
    model = session._model_for(plan.stages[0])
    groups = open_stage(model, plan.stages[0])
    trainer = session._trainer(0, tmp_path / "stage", groups, [])
    assert trainer.accelerator.ddp_handler.gradient_as_bucket_view
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert ignored >= {name for name, _ in model.named_buffers()}
    for name, parameter in model.named_parameters():
        assert (name in ignored) is not parameter.requires_grad


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_a_card_without_bf16_is_warned_of(
    card: Card, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    stages = [{**TUNE, "precision": "bf16"}]
    recipe = Recipe.model_validate({"name": "r", "method": "llava", "stages": stages})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    said = slow_precision(recipe, "cuda")
    assert said is None if capability >= (8, 0) else "no arithmetic in bf16" in str(said)
    assert slow_precision(recipe, "cpu") is None
