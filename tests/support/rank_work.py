"""What ranks do in tests; each function runs in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def train_run(run: str, **options: Any) -> list[tuple[str, bool]]:
    """Train a run; gives, by name, whether each trained parameter was in pieces in the steps."""
    from transformers import TrainerCallback

    from mmgraft.model.gathering import is_piece
    from mmgraft.training.run import plan_training, train

    found: list[tuple[str, bool]] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any):
            if state.global_step == 1:
                trained = (item for item in model.named_parameters() if item[1].requires_grad)
                found.extend((name, is_piece(parameter)) for name, parameter in trained)

    train(plan_training(Path(run), device="cpu", **options), display=lambda *_: [Look()])
    return found


def train_runs(runs: list[str]) -> list[list[tuple[str, bool]]]:
    """Several runs one after another in the same processes."""
    torch.set_num_threads(1)
    return [train_run(run) for run in runs]
