"""Whole trainings by `mmgraft train`'s own code, measured from inside: steps, epochs, peak memory.

A training runs in a forked process (`pairs.in_child`), so that its peak is its own. Its time is the
processor time of the process that trains, from the end of one step to the end of the next.
"""

from __future__ import annotations

import copy
import itertools
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from pairs import Peak, own_pages_for_large_tensors
from transformers import TrainerCallback

USUAL_PAGES = 1 << 25  # malloc's own limit: freed tensors are used again, which is faster


def import_everything() -> None:
    """Import the modules of a training before it is forked."""
    import bitsandbytes  # noqa: F401
    import transformers.models.clip.modeling_clip
    import transformers.models.llama.modeling_llama  # noqa: F401

    import mmgraft.model.files.create
    import mmgraft.training.run
    import mmgraft.training.session  # noqa: F401

    torch.set_num_threads(1)


def make_run(run: Path, base: Path, tower: Path, config: Any) -> dict[str, Any]:
    """A fresh graft; to be called in a process of its own."""
    from mmgraft.model.files.create import create_graft
    from mmgraft.vision.spec import VisionSpec

    create_graft(str(base), VisionSpec(id=str(tower)), config, run)
    return {}


def recipe(rows: Path, method: str, *stages: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A recipe over the rows of `folders.write_rows`."""
    return {
        "name": "benchmark",
        "method": method,
        "log_every": 1,
        "save_every": None,
        "data": [{"path": str(rows), "images": str(rows.parent / "images")}],
        "stages": [{"name": f"stage-{at}", "lr": 1e-4, **one} for at, one in enumerate(stages)],
        **settings,
    }


def changed(plain: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The recipe with other settings; those of a stage go into every stage."""
    from mmgraft.recipes.recipe import Stage

    new = copy.deepcopy(plain)
    for key, value in settings.items():
        if key not in Stage.model_fields or key == "precision":
            new[key] = value
            continue
        for stage in new["stages"]:
            stage[key] = value
    return new


class Clock(TrainerCallback):
    """Processor seconds at the end of every step and epoch."""

    def __init__(self, peak: Peak) -> None:
        self.peak = peak
        self.before = 0
        self.began = time.process_time()
        self.steps: list[float] = []
        self.epochs: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.before = self.peak.restart()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(time.process_time())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.epochs.append(time.process_time())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def train(run: Path, settings: dict[str, Any], memory: bool) -> dict[str, Any]:
    """Train a run by a recipe; to be called in a process of its own.

    Args:
        run: The graft's folder.
        settings: From `recipe`.
        memory: Measure the peak, with an allocator that gives everything back, which is slower;
            else the time.

    Returns:
        Bytes above what the process held after its imports: `loading`, the peak before the first
        stage's first step, and `peak`, the one of the last stage's steps. For each stage a list:
        `steps`, seconds from one step's end to the next one's; `marks`, the clock at the stage's
        beginning and at the end of each epoch; `losses`.
    """
    from mmgraft.training import run as training

    if not memory:
        own_pages_for_large_tensors(USUAL_PAGES)
    (run / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    clocks: list[Clock] = []

    def display(stage: Any, number: int, of: int) -> list[TrainerCallback]:
        clocks.append(Clock(peak))
        return [clocks[-1]]

    with Peak() as peak:
        plan = training.plan_training(run, device="cpu", restart=True)
        training.train(plan, display=display)
    return {
        "peak": peak.bytes,
        "loading": clocks[0].before,
        "steps": [_differences(clock.steps) for clock in clocks],
        "marks": [[clock.began, *clock.epochs] for clock in clocks],
        "losses": [clock.losses for clock in clocks],
    }


def _differences(marks: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(marks)]
