"""Devices in their order, and packages that are asked for but not there."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from mmgraft.errors import UsageError
from mmgraft.recipes.recipe import Recipe
from mmgraft.training.devices import check_packages, memory_in_use, pick_device


def recipe(**values) -> Recipe:
    stage = {"name": "s", "train": ["projector"], "lr": 1e-3, **values.pop("stage", {})}
    return Recipe.model_validate({"name": "r", "method": "llava", "stages": [stage], **values})


@pytest.mark.parametrize(
    ("cuda", "mps", "first"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_cuda_before_mps_before_cpu(monkeypatch, cuda, mps, first):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device() == first
    assert pick_device("cpu") == "cpu"
    if not mps:
        with pytest.raises(UsageError, match="finds no MPS"):
            pick_device("mps")


def test_unknown_devices_are_refused():
    with pytest.raises(UsageError, match="cuda, mps, cpu"):
        pick_device("tpu")


def without(monkeypatch, package: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name.startswith(package) else found(name, *a),
    )


@pytest.mark.parametrize(
    "values",
    [{"quantization": "nf4"}, {"stage": {"optimizer": "adamw_8bit"}}],
    ids=["4-bit", "8-bit optimizer"],
)
def test_bits_need_bitsandbytes_and_a_device_that_it_runs_on(monkeypatch, values):
    check_packages(recipe(**dict(values)), "cpu")
    with pytest.raises(UsageError, match="MPS"):
        check_packages(recipe(**dict(values)), "mps")
    without(monkeypatch, "bitsandbytes")
    with pytest.raises(UsageError, match=r"pip install 'mmgraft\[4bit\]'"):
        check_packages(recipe(**dict(values)), "cpu")


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_start(monkeypatch, tracker):
    without(monkeypatch, tracker)
    with pytest.raises(UsageError, match=f"pip install {tracker}"):
        check_packages(recipe(tracking=tracker), "cpu")
    check_packages(recipe(), "cpu")


def test_memory_is_in_bytes():
    assert 10**7 < (memory_in_use("cpu") or 0) < 10**12
