"""Two ranks compute what one does with twice the accumulation, also where one sees no image."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmgraft.training.run import plan_training, train
from tiny_runs import losses, make_run, write_recipe

STAGE = {
    "name": "tune",
    "train": ["projector", "learners", "router"],
    "text_rows": "graft",  # a rank whose row has no image leaves the visual learners out
    "lr": 1e-3,
    "batch_size": 1,
    "max_steps": 5,
}


@pytest.mark.slow
def test_two_ranks_are_one(parts: Path, tmp_path: Path):
    one = make_run(parts, tmp_path / "one", "wings")
    write_recipe(one, parts, "wings", [{**STAGE, "accumulate": 2}])
    train(plan_training(one, device="cpu"))
    two = make_run(parts, tmp_path / "two", "wings")
    write_recipe(two, parts, "wings", [STAGE], save_every=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "mmgraft", "train", str(two), "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert [step for _, step, _ in losses(two)] == [1, 2, 3, 4, 5]
    wanted = [loss for *_, loss in losses(one)]
    assert [loss for *_, loss in losses(two)] == pytest.approx(wanted, abs=1e-5)
    before, after = load_file(one / "graft.safetensors"), load_file(two / "graft.safetensors")
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=1e-4)
