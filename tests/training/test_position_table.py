"""A base with a table of positions: rows beyond it are named before anything is put away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmgraft.errors import UsageError
from mmgraft.training.run import plan_training, train
from tiny_runs import make_parts, make_run, write_recipe

ALIGN = {"name": "align", "train": ["projector"], "lr": 1e-3, "batch_size": 4, "max_steps": 1}
TABLE = 128  # of the tiny GPT-2


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's rows, and behind them one that is far longer than its table."""
    folder = make_parts(tmp_path_factory.mktemp("parts"), "gpt2")
    first, *rest = (folder / "rows.jsonl").read_text().splitlines()
    long = json.loads(first) | {"id": "long"}
    long["messages"].append({"role": "user", "content": "and then? " * 40})
    long["messages"].append({"role": "assistant", "content": "red"})
    (folder / "rows.jsonl").write_text("\n".join([first, *rest, json.dumps(long)]) + "\n")
    return folder


@pytest.fixture
def run(parts: Path, tmp_path: Path) -> Path:
    return make_run(parts, tmp_path / "run", "llava")


def refused(run: Path) -> str:
    """Check the message, and that an earlier training's metrics are still there."""
    (run / "metrics.jsonl").write_text('{"earlier": true}\n')
    before = sorted(run.rglob("*"))
    plan = plan_training(run, restart=True)
    with pytest.raises(UsageError) as caught:
        train(plan)
    assert sorted(run.rglob("*")) == before
    assert "earlier" in (run / "metrics.jsonl").read_text()
    return str(caught.value)


def test_a_longer_row_is_named_with_its_length_and_the_tables(parts: Path, run: Path) -> None:
    write_recipe(run, parts, "llava", [ALIGN])
    said = refused(run)
    assert "line 13 (id long): " in said
    length = int(said.partition("(id long): ")[2].split()[0])
    assert length > TABLE
    assert f"a table of {TABLE}; set max_length: {TABLE}" in said


def test_what_is_said_helps(parts: Path, run: Path) -> None:
    """A row of exactly the table's length is trained on; one position more is refused."""
    write_recipe(run, parts, "llava", [{**ALIGN, "max_length": TABLE, "batch_size": 13}])
    (result,) = train(plan_training(run))
    assert (result.steps, result.bad_rows) == (1, 0)
    write_recipe(run, parts, "llava", [{**ALIGN, "max_length": TABLE + 1}])
    assert f"{TABLE + 1} positions" in refused(run)


def test_such_rows_are_skipped_where_bad_ones_are(parts: Path, run: Path) -> None:
    write_recipe(run, parts, "llava", [{**ALIGN, "batch_size": 13}], on_bad_row="skip")
    (result,) = train(plan_training(run))
    assert (result.steps, result.bad_rows) == (1, 1)
    (bad,) = map(json.loads, (run / "bad_rows.jsonl").read_text().splitlines())
    assert bad["id"] == "long"


def test_a_packed_sequence_is_no_longer_than_the_table(parts: Path, run: Path) -> None:
    write_recipe(run, parts, "llava", [{**ALIGN, "packing": True, "max_length": 2 * TABLE}])
    said = refused(run)
    assert f"max_length: {2 * TABLE}, and the base has a table of {TABLE} positions" in said
    write_recipe(run, parts, "llava", [{**ALIGN, "packing": True, "max_length": TABLE}])
    (result,) = train(plan_training(run))
    assert result.steps == 1


def test_learners_in_every_layer_are_not_compiled_nor_is_anything_touched(
    parts: Path, tmp_path: Path
) -> None:
    run = make_run(parts, tmp_path / "wings", "wings")
    stage = {**ALIGN, "max_length": TABLE}
    write_recipe(run, parts, "wings", [stage], compile=True)
    assert "finds no layer to compile" in refused(run)
