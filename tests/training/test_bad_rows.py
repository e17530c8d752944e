"""`on_bad_row: skip`: what is left out is logged, and a run that goes on does without the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mmgraft.data.rows import BadRow, BadRowLog
from mmgraft.errors import UsageError
from mmgraft.training.callbacks.stopping import TrainingStopped
from mmgraft.training.run import plan_training, train
from mmgraft.training.stage_data import check_images
from tiny_runs import losses, make_rows, make_run, write_recipe

STAGES = [
    {"name": "tune", "train": ["projector"], "lr": 1e-3, "epochs": 2, "batch_size": 2},
    {"name": "more", "train": ["projector"], "lr": 1e-3, "max_steps": 2, "max_length": 44},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine rows with a picture, of which two can be read and not be used, and two that cannot."""
    folder = tmp_path / "data"
    make_rows(folder)
    picture = bytearray((folder / "images" / "1.png").read_bytes())
    picture[picture.index(b"IDAT") + 6] ^= 255
    (folder / "images" / "1.png").write_bytes(picture)
    (folder / "images" / "4.png").write_bytes(b"GIF89a")
    (folder / "images" / "8.png").unlink()
    with (folder / "rows.jsonl").open("a") as file:
        file.write("{half a row\n")
    return folder


def make(parts: Path, run: Path, data: Path, **recipe) -> Path:
    make_run(parts, run, "llava")
    write_recipe(run, data, "llava", STAGES, **{"on_bad_row": "skip", "save_every": 1, **recipe})
    return run


def logged(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "bad_rows.jsonl").read_text().splitlines()]
    return [(line["stage"], line["place"], line["id"], line["fault"]) for line in lines]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            control.should_save = control.should_training_stop = True


def test_each_is_logged_with_its_reason_and_the_rest_is_trained(parts, tmp_path, data):
    run = make(parts, tmp_path / "run", data)
    plan = plan_training(run)
    assert not (run / "bad_rows.jsonl").exists()  # a plan writes nothing
    said: list[str] = []
    first, second = train(plan, announce=said.append)
    assert second.bad_rows > 2
    before = [(None, "line 9", "8", "missing"), (None, "line 13", None, "row")]
    met = [("line 2", "1", "broken"), ("line 5", "4", "broken")]
    found = logged(run)
    assert found[:2] == before
    assert sorted(found[2:4]) == sorted(("tune", *one) for one in met)
    assert {(stage, fault) for stage, *_, fault in found[4:]} <= {
        ("more", "row"),
        ("more", "broken"),
    }
    assert first.bad_rows == 4
    assert first.rows == 8  # the two that are met keep their places, with other rows in them
    assert len([text for text in said if text.startswith("left out: ")]) >= 4
    assert any(f"{data / 'rows.jsonl'}, line 5 (id 4): " in text for text in said)
    for line in (run / "bad_rows.jsonl").read_text().splitlines():
        assert json.loads(line)["file"] == str(data / "rows.jsonl")
    train(plan_training(run, restart=True))
    assert logged(run)[:2] == before  # a new log


@pytest.mark.parametrize("cached", [False, True])
def test_a_resumed_run_does_without_the_same_rows_though_all_are_mended(
    parts, tmp_path, data, cached
):
    whole = make(parts, tmp_path / "whole", data, feature_cache=cached)
    train(plan_training(whole))
    run = make(parts, tmp_path / "run", data, feature_cache=cached)
    with pytest.raises(TrainingStopped):
        train(plan_training(run), display=lambda *_: [Stop()])
    for number in (1, 4, 8):
        shutil.copy(data / "images" / "0.png", data / "images" / f"{number}.png")
    torch.manual_seed(99)
    plan = plan_training(run, resume=True)
    assert len(plan.rows[0]) - plan.skipped[0] == 8
    train(plan)
    assert losses(run) == losses(whole)
    mine, wanted = load_file(run / "graft.safetensors"), load_file(whole / "graft.safetensors")
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    assert len(logged(run)) == len(set(logged(run)))


def test_by_default_the_ends_of_every_picture_are_looked_at_before(parts, tmp_path, data):
    shutil.copy(data / "images" / "0.png", data / "images" / "8.png")
    text = (data / "rows.jsonl").read_text()
    (data / "rows.jsonl").write_text(text.replace("{half a row\n", ""))
    run = make(parts, tmp_path / "run", data, on_bad_row="error")
    with pytest.raises(UsageError, match=r"rows\.jsonl, line 5 \(id 4\): .*4\.png"):
        plan_training(run)
    shutil.copy(data / "images" / "0.png", data / "images" / "4.png")
    plan = plan_training(run)  # the other one is broken in its middle
    assert check_images(plan.rows[0]) == 9
    assert check_images(plan.rows[0], most=4) == 3
    assert check_images([]) == 0


def test_a_row_that_a_later_stage_cuts_to_nothing_is_found_before_the_first(parts, tmp_path):
    run = make_run(parts, tmp_path / "run", "llava")
    stages = [STAGES[0], {**STAGES[1], "max_length": 8}]
    write_recipe(run, parts, "llava", stages)
    with pytest.raises(UsageError, match=r"line \d+ \(id \d+\): .* raise max_length"):
        train(plan_training(run))
    assert not (run / "metrics.jsonl").exists()
    assert not (run / "checkpoints").exists()


def test_a_log_survives_a_line_that_a_kill_cut_short(tmp_path):
    one, two = (BadRow("/f", f"line {n}", None, "row", "why") for n in (1, 2))
    log = BadRowLog(tmp_path)
    assert log.add([one, one], "s", 3) == [one]
    with (tmp_path / "bad_rows.jsonl").open("a") as file:
        file.write('{"file": "/f", "pla')
    log = BadRowLog(tmp_path)
    assert log.add([one, two], "s", 4) == [two]
    assert BadRowLog(tmp_path).left_out("s") == {one.key, two.key}
    assert BadRowLog(tmp_path).left_out(None) == set()
