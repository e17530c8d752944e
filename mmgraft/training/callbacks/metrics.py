"""metrics.jsonl: one line a log, always written, whatever tracker is in use."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mmgraft.atomic import atomic_text, free_name

FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends step, loss, rates by group, speed, memory and the graft's readings of one stage.

    Args:
        run: The run folder.
        stage: Name of the stage.
    """

    def __init__(self, run: Path, stage: str) -> None:
        self.path = run / FILE
        self.stage = stage
        self.last: dict[str, Any] = {}

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not logs or not state.is_world_process_zero:
            return
        line: dict[str, Any] = {"stage": self.stage, "step": state.global_step}
        if "loss" in logs:
            line["loss"] = logs["loss"]
            line["lr"] = {k[3:]: v for k, v in logs.items() if k.startswith("lr/")}
            for key in ("grad_norm", "tokens_per_second", "memory_gb", "epoch"):
                if key in logs:
                    line[key] = logs[key]
            if own := {k[6:]: v for k, v in logs.items() if k.startswith("graft/")}:
                line["graft"] = own
            self.last = line
        elif "eval_loss" in logs:
            line["eval_loss"] = logs["eval_loss"]
        else:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def trim(run: Path, done: Collection[str], stage: str, step: int) -> None:
    """Drop lines of steps that a resumed run will take again: those of a stage after a step.

    Args:
        run: The run folder.
        done: Stages whose lines stay.
        stage: That is gone on with.
        step: Its last one that stays.
    """
    path = run / FILE
    if not path.is_file():
        return
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a line that a kill cut short
        if line["stage"] in done or (line["stage"] == stage and line["step"] <= step):
            lines.append(text + "\n")
    atomic_text(path, "".join(lines))


def put_aside(run: Path) -> None:
    """Keep the metrics of an earlier training under the next free number."""
    path = run / FILE
    if path.is_file():
        path.replace(free_name(path, "-"))


@contextmanager
def tracking_folder(folder: Path) -> Iterator[None]:
    """Put TensorBoard's files into the run unless the user has chosen another folder."""
    name = "TENSORBOARD_LOGGING_DIR"
    chosen = name in os.environ
    os.environ.setdefault(name, str(folder))
    try:
        yield
    finally:
        if not chosen:
            os.environ.pop(name, None)
