"""Progress of a stage: a live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from typing_extensions import Self

from mmgraft.recipes.recipe import Stage


class ProgressDisplay(TrainerCallback):
    """Loss, tokens a second, memory and time left of one stage.

    Args:
        stage: Its name.
        number: Its number among the stages, from 1.
        stages: How many there are.
        console: Where to; on a terminal the line is live, elsewhere every log is a line.
    """

    def __init__(self, stage: str, number: int, stages: int, console: Console) -> None:
        self.title = f"{stage} ({number}/{stages})" if stages > 1 else stage
        self.console = console
        self.latest: dict[str, float] = {}
        self._progress: Progress | None = None
        self._task: Any = None
        self._began = time.monotonic()
        self._first_step = 0

    @classmethod
    def on(cls, console: Console) -> Callable[[Stage, int, int], list[Self]]:
        """Return what makes the display of each stage on a console; see ``training.run.train``."""
        return lambda stage, number, stages: [cls(stage.name, number, stages, console)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()
        self._first_step = state.global_step
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task(
            self.title, total=state.max_steps, completed=state.global_step, numbers=""
        )
        self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self._line(f"{self.title}: step {state.global_step}, eval loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        self.latest = dict(logs)
        if self._progress is not None:
            self._progress.update(self._task, numbers=numbers(logs))
            return
        left = self.time_left(state.global_step, state.max_steps)
        self._line(
            f"{self.title}: step {state.global_step}/{state.max_steps}, {numbers(logs)}"
            + (f", {clock(left)} left" if left is not None else "")
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the live line away, also after an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def time_left(self, step: int, steps: int) -> float | None:
        """Estimate the seconds until the last step, at the speed since this session began."""
        done = step - self._first_step
        return None if done <= 0 else (time.monotonic() - self._began) / done * (steps - step)

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)


def numbers(logs: dict[str, float]) -> str:
    """Write loss, speed and memory in few words."""
    parts = [f"loss {logs['loss']:.4f}"]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "memory_gb" in logs:
        parts.append(f"{logs['memory_gb']:.1f} GB")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """``3725`` as ``1:02:05``, ``65`` as ``1:05``."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
