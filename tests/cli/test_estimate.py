"""`mmgraft estimate`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmgraft.training.memory import shortage
from tiny_runs import make_parts, make_run, write_recipe

STAGE = {"name": "align", "train": ["projector"], "lr": 1e-3, "batch_size": 4, "max_steps": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = make_parts(tmp_path_factory.mktemp("parts"))
    write_recipe(make_run(parts, parts / "x-llava", "llava"), parts, "llava", [STAGE])
    return parts / "x-llava"


def test_a_run_is_shown_with_its_card_and_what_saves(made, cli):
    done = cli("estimate", made)
    assert done.code == 0
    for words in ("align", "trained", "peak", "enough: 8 GB (RTX 4060)", "left free"):
        assert words in done.out
    assert "gradient_checkpointing: true" in done.out


def test_json_holds_bytes(made, cli):
    done = cli("estimate", made, "--json", "--length", "40", "--device", "cpu")
    found = json.loads(done.out)
    (stage,) = found["stages"]
    assert found["peak"] == stage["peak"] > sum(stage["weights"].values())
    assert stage["rows"]["length"] == 40
    assert found["card"]["gb"] == 8
    assert all(one["saves"] == found["peak"] - one["peak"] for one in found["savings"])


def test_overrides_are_those_of_train(made, cli):
    def peak(*options: str) -> int:
        return json.loads(cli("estimate", made, "--json", *options).out)["peak"]

    plain = peak()
    assert peak("--set", "stages.*.gradient_checkpointing=true") < plain
    assert peak("--set", "stages.align.batch_size=8") > plain


def test_several_processes_share_what_the_recipe_says(made, cli):
    def found(*options: str) -> dict:
        return json.loads(cli("estimate", made, "--json", "--length", "40", *options).out)

    one, two = found(), found("--processes", "2", "--set", "parallel=fsdp2")
    (alone,), (half,) = one["stages"], two["stages"]
    assert half["weights"] == {name: -(-size // 2) for name, size in alone["weights"].items()}
    assert half["optimizer"] == alone["optimizer"] / 2 == 4 * alone["trained"]
    assert (two["processes"], two["parallel"], one["not_counted"]) == (2, "fsdp2", [])
    shown = cli("estimate", made, "--processes", "2", "--set", "parallel=fsdp2", "--length", "40")
    for words in ("each of 2 processes, parallel: fsdp2", "of others, for a moment",
                  "for each process", "not counted: parallel: fsdp2"):  # fmt: skip
        assert words in shown.out
    here = cli("estimate", made, "--processes", "2", "--device", "cpu", "--length", "40")
    assert "in all " in here.out
    assert "of others" not in cli("estimate", made, "--length", "40").out


def test_rows_without_an_image_alone_are_refused_as_a_training_would(made, cli, tmp_path):
    rows = tmp_path / "text.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    done = cli("estimate", made, "--data", rows)
    assert done.code == 2
    assert "not one of 1 rows has an image" in done.err


def test_a_recipe_without_a_base_says_what_to_give(cli):
    done = cli("estimate", "llava")
    assert done.code == 2
    assert "--base" in done.err


def test_an_unknown_device_is_refused(made, cli):
    done = cli("estimate", made, "--device", "tpu")
    assert done.code == 2
    assert "cuda or cpu" in done.err


def test_train_warns_first_and_trains(made, cli, monkeypatch):
    monkeypatch.setattr(shortage, "free_memory", lambda device: 10_000)
    done = cli("train", made, "--device", "cpu")
    assert done.code == 0
    assert "warning: stage 'align' needs about" in done.err
