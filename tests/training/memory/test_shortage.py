"""Too little memory: who finds it, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmgraft.errors import MMGraftError, is_out_of_memory
from mmgraft.recipes.recipe import Recipe
from mmgraft.training.memory import shortage
from mmgraft.training.memory.request import estimator_of_plan
from mmgraft.training.run import plan_training, train
from mmgraft.training.session import Session
from tiny_runs import make_parts, make_run, write_recipe

STAGE = {"name": "align", "train": ["projector"], "lr": 1e-3, "batch_size": 4, "max_steps": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = make_parts(tmp_path_factory.mktemp("parts"))
    made = make_run(parts, parts / "run", "llava")
    write_recipe(made, parts, "llava", [STAGE])
    return made


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (type("AcceleratorError", (RuntimeError,), {})("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_no_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_an_allocation_that_fails_ends_with_the_switch_to_set(run, monkeypatch):
    def run_stage(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes\nmore")

    monkeypatch.setattr(Session, "run_stage", run_stage)
    with pytest.raises(MMGraftError) as caught:
        train(plan_training(run, device="cpu"))
    assert caught.value.exit_code == 1
    assert "out of memory in stage 'align'" in str(caught.value)
    assert "Set gradient_checkpointing: true (then: batch_size: 1" in str(caught.value)


def test_other_errors_pass(run, monkeypatch):
    def run_stage(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(Session, "run_stage", run_stage)
    with pytest.raises(RuntimeError, match="a defect"):
        train(plan_training(run, device="cpu"))


def test_advice_leaves_out_what_is_set():
    stage = {**STAGE, "gradient_checkpointing": True, "batch_size": 1, "optimizer": "adamw_8bit"}
    recipe = Recipe.model_validate({"name": "r", "method": "llava", "stages": [stage]}).resolved()
    assert shortage.advice(recipe, recipe.stages[0]).startswith("Set quantization: nf4, for")
    whole = recipe.model_copy(update={"quantization": "nf4"})
    assert "shorter max_length" in shortage.advice(whole, whole.stages[0])


def test_a_training_that_is_too_large_is_warned_of_and_one_that_fits_not(run, monkeypatch):
    plan = plan_training(run, device="cpu")
    monkeypatch.setattr(shortage, "free_memory", lambda device: 10_000)
    warned = shortage.warning(plan)
    assert warned is not None
    assert "stage 'align' needs about" in warned
    assert "main memory" in warned
    assert "gradient_checkpointing: true" in warned
    monkeypatch.setattr(shortage, "free_memory", lambda device: 10**15)
    assert shortage.warning(plan) is None


def test_free_memory_is_some_of_this_machine():
    free = shortage.free_memory("cpu")
    assert free > 1_000_000


def test_on_a_cpu_all_processes_of_the_machine_count(run, monkeypatch):
    plan = plan_training(run, device="cpu")
    (stage,) = estimator_of_plan(plan).stages()
    monkeypatch.setattr(shortage, "free_memory", lambda device: int(1.5 * stage.peak))
    assert shortage.warning(plan) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    warned = shortage.warning(plan)
    assert warned is not None
    assert "in each of 2 processes" in warned
