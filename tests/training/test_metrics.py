"""metrics.jsonl: what a line holds, and what a resumed or new training does with old lines."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from mmgraft.training.callbacks.metrics import MetricsFile, put_aside, trim

STATE = SimpleNamespace(global_step=3, is_world_process_zero=True)
LOGS = {"loss": 1.5, "lr/projector": 1e-3, "lr/layers": 2e-5, "tokens_per_second": 10.0}


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_line_holds_stage_step_loss_and_every_rate(tmp_path):
    file = MetricsFile(tmp_path, "tune")
    file.on_log(None, STATE, None, logs={**LOGS, "memory_gb": 2.0, "unknown": 1})
    file.on_log(None, STATE, None, logs={"eval_loss": 0.5, "eval_runtime": 1.0})
    file.on_log(None, STATE, None, logs={"train_runtime": 1.0})
    first, second = lines(tmp_path)
    assert first == {
        "stage": "tune",
        "step": 3,
        "loss": 1.5,
        "lr": {"projector": 1e-3, "layers": 2e-5},
        "tokens_per_second": 10.0,
        "memory_gb": 2.0,
    }
    assert second == {"stage": "tune", "step": 3, "eval_loss": 0.5}
    assert file.last == first


def test_other_ranks_write_nothing(tmp_path):
    other = SimpleNamespace(global_step=3, is_world_process_zero=False)
    MetricsFile(tmp_path, "tune").on_log(None, other, None, logs=LOGS)
    assert not list(tmp_path.iterdir())


def test_steps_that_are_taken_again_are_dropped_and_half_lines_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a", "step": 1}\n{"stage": "a", "step": 2}\n{"stage": "a", "st')
    trim(tmp_path, (), "a", 1)
    assert lines(tmp_path) == [{"stage": "a", "step": 1}]
    trim(tmp_path / "nowhere", (), "a", 1)  # a run without metrics is no error


def test_metrics_of_an_earlier_training_are_kept(tmp_path):
    for text in ("1", "2"):
        (tmp_path / "metrics.jsonl").write_text(text)
        put_aside(tmp_path)
    put_aside(tmp_path)
    assert (tmp_path / "metrics-1.jsonl").read_text() == "1"
    assert (tmp_path / "metrics-2.jsonl").read_text() == "2"
    assert len(list(tmp_path.iterdir())) == 2
