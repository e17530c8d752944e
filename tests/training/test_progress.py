"""The display: plain lines for a pipe, a live line for a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from mmgraft.training.callbacks.progress import ProgressDisplay, clock

LOGS = {"loss": 1.23456, "tokens_per_second": 4321.0, "memory_gb": 7.89, "lr/projector": 1e-3}


def state(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=20, is_world_process_zero=True)


def shown(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    display = ProgressDisplay("tune", 2, 3, console)
    display.on_train_begin(None, state(5), None)
    display.on_step_end(None, state(10), None)
    display.on_log(None, state(10), None, logs=LOGS)
    display.on_log(None, state(10), None, logs={"eval_loss": 0.5})
    display.on_log(None, state(10), None, logs={"train_runtime": 3.0})
    display.on_train_end(None, state(20), None)
    display.close()
    return out.getvalue()


def test_a_pipe_gets_one_plain_line_a_log():
    lines = shown(terminal=False).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("tune (2/3): step 10/20, loss 1.2346, 4,321 tokens/s, 7.9 GB, ")
    assert lines[0].endswith(" left")
    assert lines[1] == "tune (2/3): step 10, eval loss 0.5000"
    assert "\x1b" not in shown(terminal=False)


def test_a_terminal_gets_a_live_line_with_the_same_numbers():
    text = shown(terminal=True)
    assert "loss 1.2346, 4,321 tokens/s, 7.9 GB" in text
    assert "10/20" in text
    assert "step 10/20" not in text


def test_other_ranks_are_silent():
    out = io.StringIO()
    display = ProgressDisplay("tune", 1, 1, Console(file=out))
    other = SimpleNamespace(global_step=1, max_steps=2, is_world_process_zero=False)
    display.on_train_begin(None, other, None)
    display.on_log(None, other, None, logs=LOGS)
    assert out.getvalue() == ""


def test_time_left_counts_from_where_a_resumed_stage_began(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("mmgraft.training.callbacks.progress.time.monotonic", lambda: now[0])
    display = ProgressDisplay("tune", 1, 1, Console(file=io.StringIO()))
    display.on_train_begin(None, state(10), None)
    assert display.time_left(10, 20) is None
    now[0] = 108.0
    assert display.time_left(14, 20) == pytest.approx(12.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0:05"), (65.4, "1:05"), (3725, "1:02:05"), (3599.9, "1:00:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
