"""Compare two trainings: weights, losses and files, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmgraft.training import checkpoint


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All that the run has trained, by file and name."""
    return {
        f"{path.relative_to(run)}:{name}": tensor
        for path in sorted(run.rglob("*.safetensors"))
        if "features" not in path.parts
        for name, tensor in load_file(path).items()
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return what was logged, but for speed and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speed = ("tokens_per_second", "memory_gb")
    return [{key: value for key, value in line.items() if key not in speed} for line in lines]


def same(run: Path, other: Path) -> None:
    """Assert that two runs have ended alike to the bit."""
    mine, wanted = tensors(run), tensors(other)
    assert mine.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(mine[name], wanted[name]), name
    assert metrics(run) == metrics(other)
    assert checkpoint.read_progress(run) == checkpoint.read_progress(other)
    files = [{path.relative_to(one) for path in one.rglob("*")} for one in (run, other)]
    assert {path for path in files[0] ^ files[1] if path.parts[0] != "features"} == set()
