"""Twenty steps of each method, trained in each way: losses, and the tensors at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ranks import on_ranks
from unchanged.comparing import TOLERANCE, tensor_hash
from unchanged.conditions import one_thread
from unchanged.parts import METHODS, command, make_graft, write_recipe

_TUNE: dict[str, Any] = {
    "name": "tune",
    "train": ["projector", "graft"],
    "lr": {"projector": 2e-3, "default": 5e-4},
    "max_steps": 20,
    "batch_size": 2,
    "schedule": "linear",
    "warmup_steps": 3,
    "weight_decay": 0.05,
    "betas": [0.85, 0.99],
    "eps": 1e-4,
    "clip_norm": 0.7,
    "max_length": 120,
}
_ALIGN = {**_TUNE, "name": "align", "train": ["projector"], "lr": 3e-3, "warmup_steps": None,
          "warmup_ratio": 0.25, "schedule": "cosine", "text_rows": "skip", "graft_active": False,
          "max_steps": 8}  # fmt: skip

TWO = "two-processes"
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # What the stage says otherwise, and what the recipe does.
    "plain": ({"group_by": "length", "accumulate": 2, "max_steps": 12}, {"eval_every": 6}),
    "packed": ({"packing": True}, {}),
    "checkpointed": ({"gradient_checkpointing": True, "group_by": "modality"}, {}),
    "4-bit": ({}, {"quantization": "nf4"}),
    TWO: ({}, {"parallel": "ddp"}),
    "bf16": ({"image_share": 0.6}, {"precision": "bf16", "feature_cache": True}),
}
"""Trainings by name. In the plain one the first 8 of 20 steps train the projector."""

_COARSE = {"bf16": 0.05, "4-bit": 0.05}  # a processor with bf16 has another kernel for 4 bits

CASES = [f"{method}-{way}" for method in METHODS for way in WAYS]


def record(parts: Path, folder: Path, case: str) -> dict[str, Any]:
    """Train a case in `folder`; gives what is recorded of it."""
    method, _, way = case.partition("-")
    run = make_graft(parts, folder / case, method)
    write_recipe(run, parts, method, _stages(method, way), **_recipe(parts, way))
    if way == TWO:
        on_ranks(train_as_rank, str(run))
    else:
        with one_thread():
            train(run)
    return outcome(run)


def tolerance(way: str) -> float:
    """Compare the numbers of a way under other conditions than those of the recording."""
    return _COARSE.get(way, TOLERANCE)


def train(run: Path) -> None:
    """Train a run to its end."""
    command("train", run, "--device", "cpu")


def train_as_rank(run: str) -> None:
    """Train as each process of `mmgraft train --processes` does."""
    with one_thread():
        train(Path(run))


def _stages(method: str, way: str) -> list[dict[str, Any]]:
    tune = {**_TUNE, **WAYS[way][0]}
    if method == "llava":
        tune |= {"train": ["projector"], "lr": 2e-3}
    return [_ALIGN, tune] if way == "plain" else [tune]


def _recipe(parts: Path, way: str) -> dict[str, Any]:
    more = dict(WAYS[way][1])
    if "eval_every" in more:
        more["eval_data"] = [{"path": str(parts / "rows.jsonl"), "images": str(parts / "images")}]
    return more


def outcome(run: Path) -> dict[str, Any]:
    """Return each step's loss, gradient norm and rates, the evaluations, and the last tensors."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    tensors = dict(sorted(load_file(run / "graft.safetensors").items()))
    return {
        "steps": [f"{line['stage']} {line['step']}" for line in steps],
        "losses": [line["loss"] for line in steps],
        "gradients": [line["grad_norm"] for line in steps],
        "rates": [rate for line in steps for rate in line["lr"].values()],
        "evaluations": [line["eval_loss"] for line in lines if "eval_loss" in line],
        "mean sizes": {name: _mean_size(one) for name, one in tensors.items()},
        "tensors sha256": {name: tensor_hash(one) for name, one in tensors.items()},
    }


def _mean_size(tensor: Tensor) -> float:
    """Return what is compared of a tensor under other conditions."""
    return tensor.double().abs().mean().item()
