"""Ways of sharing a training that cannot work are refused by name, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmgraft.errors import UsageError
from mmgraft.recipes.recipe import Recipe
from mmgraft.training.distributed import parallel
from mmgraft.training.distributed.parallel import (
    check_count,
    check_parallel,
    way_on,
)
from mmgraft.training.run import plan_training
from tiny_runs import make_run, write_recipe

STAGE = {"name": "align", "train": ["projector"], "lr": 1e-3}


def recipe(stage: dict[str, Any] | None = None, **more: Any) -> Recipe:
    given = {"name": "x", "method": "llava", "stages": [{**STAGE, **(stage or {})}], **more}
    return Recipe.model_validate(given)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_is_refused_by_name_and_fsdp2_is_named(parts: Path, tmp_path: Path, name: str):
    run = make_run(parts, tmp_path / "run", "llava")
    write_recipe(run, parts, "llava", [STAGE], parallel=name)
    with pytest.raises(UsageError, match=rf"'parallel': {name} \(DeepSpeed\).*fsdp2") as refused:
        plan_training(run, device="cpu")
    assert refused.value.exit_code == 2
    assert recipe(parallel="fsdp2", quantization="nf4").parallel == "fsdp2"


def test_8_bit_optimizers_need_whole_states():
    with pytest.raises(ValueError, match="adamw_8bit keeps whole states"):
        recipe({"optimizer": "adamw_8bit"}, parallel="fsdp2")
    assert recipe({"optimizer": "adamw_8bit"}).parallel == "ddp"


def test_fsdp_through_accelerate_is_refused_on_every_device_with_any_number_of_processes(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make_run(parts, tmp_path / "run", "llava")
    write_recipe(run, parts, "llava", [STAGE])
    plan_training(run, device="cpu")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch --use_fsdp sets it
    with pytest.raises(
        UsageError, match=r"trains with DDP without saying so.*--set parallel=fsdp2"
    ):
        plan_training(run, device="cpu")


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "--set parallel=fsdp2"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "not built here"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "not built here"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--set compile=true"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "write mixed_precision: no"),
    ],
)
def test_another_way_of_accelerate_is_refused(
    variable: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
):
    check_parallel(recipe(), "cpu", 2)
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=says):
        check_parallel(recipe(), "cpu", 2)


def test_what_accelerate_says_of_precision_must_hold_for_every_stage(
    monkeypatch: pytest.MonkeyPatch,
):
    for name, value in (("MIXED_PRECISION", "bf16"), ("DYNAMO_BACKEND", "NO")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    check_parallel(recipe(precision="bf16"), "cpu", 2)
    with pytest.raises(UsageError, match="says precision: fp32"):
        check_parallel(recipe({"precision": "fp32"}, precision="bf16"), "cpu", 2)


@pytest.mark.parametrize(
    ("given", "device", "says"),
    [
        ({}, "mps", "do not train on MPS"),
        ({"parallel": "fsdp2", "quantization": "nf4"}, "cpu", "needs CUDA"),
    ],
)
def test_what_a_device_cannot_do(given: dict[str, Any], device: str, says: str):
    check_parallel(recipe(**given), device, 1)  # one process trains by itself, whatever is said
    with pytest.raises(UsageError, match=says):
        check_parallel(recipe(**given), device, 2)


def test_more_processes_than_cards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_parallel(recipe(parallel="fsdp2", quantization="nf4"), "cuda", 2)
    with pytest.raises(UsageError, match="3 processes on a machine with 2 cards"):
        check_parallel(recipe(), "cuda", 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # four on two machines
    check_parallel(recipe(), "cuda", 4)


def test_fsdp2_needs_a_torch_that_mixes_dtypes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel.torch, "__version__", "2.7.1+cpu")
    check_parallel(recipe(), "cpu", 2)
    with pytest.raises(UsageError, match=r"needs torch 2.8.*parallel=ddp"):
        check_parallel(recipe(parallel="fsdp2"), "cpu", 2)


def test_going_on_wants_as_many_processes_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun: dict[str, Any] = {"stages": ["a", "b"], "finished": ["a"], "processes": 2}
    check_count(tmp_path, begun, 2)
    with pytest.raises(UsageError, match=r"in 2 processes, and this is 3.*--processes 2\n"):
        check_count(tmp_path, begun, 3)
    with pytest.raises(UsageError, match=r"in 1 process, and this is 2.*--resume\nor"):
        check_count(tmp_path, {**begun, "processes": 1}, 2)
    check_count(tmp_path, {**begun, "finished": ["a", "b"]}, 3)  # nothing is left to train
    check_count(tmp_path, {"stages": ["a"], "finished": []}, 3)  # of an earlier mmgraft
    assert way_on(tmp_path) == f"mmgraft train {tmp_path} --resume"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert way_on(tmp_path) == f"mmgraft train {tmp_path} --resume --processes 4"
