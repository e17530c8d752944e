"""Runs and recipes, estimated from configs and rows alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmgraft.errors import UsageError
from mmgraft.training.memory.request import estimator_of_plan, read_request
from mmgraft.training.run import plan_training
from tiny_runs import make_parts, make_run, write_recipe

ALIGN = {"name": "align", "train": ["projector"], "lr": 1e-3, "batch_size": 4}
TUNE = {"name": "tune", "train": ["projector", "graft"], "lr": 1e-3, "accumulate": 2}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def run(shared: Path) -> Path:
    made = make_run(shared, shared / "run", "iaa")
    write_recipe(made, shared, "iaa", [{**ALIGN, "graft_active": False}, TUNE])
    return made


def test_a_run_is_estimated_stage_by_stage_and_adds_up(run):
    request = read_request(run, device="cpu")
    align, tune = request.stages()
    assert (align.stage, tune.stage) == ("align", "tune")
    assert align.trained < tune.trained <= tune.parameters
    for stage in (align, tune):
        assert stage.gradients == 4 * stage.trained
        assert stage.optimizer == 8 * stage.trained
        still = sum(stage.weights.values()) + stage.tower + stage.optimizer
        assert stage.peak > still
    assert align.rows.source == "longest of 9 rows"  # of twelve, three have no image
    assert align.rows.length == tune.rows.length


def test_the_plan_of_a_training_gives_the_same(run):
    request = read_request(run, device="cpu")
    plan = plan_training(run, device="cpu")
    assert estimator_of_plan(plan).stages() == request.stages()


def test_no_weights_are_read(run, shared, tmp_path):
    weights = [shared / part / "model.safetensors" for part in ("base", "tower")]
    for path in weights:
        path.rename(path.with_suffix(".away"))
    try:
        assert read_request(run, length=30, base=str(shared / "base"))
        request = read_request(run, length=30)
        assert request.stages()
    finally:
        for path in weights:
            path.with_suffix(".away").rename(path)


def test_a_recipe_without_a_graft_is_that_of_the_graft_it_would_make(run, shared):
    options = {
        "base": str(shared / "base"),
        "vision": str(shared / "tower"),
        "overrides": [
            "graft.config={layers: [1, 2], embedding: false, head: false}",
            "graft.projector={norm: true}",
        ],
        "length": 30,
        "device": "cpu",
    }
    of_recipe = read_request(run / "recipe.yaml", **options)
    of_run = read_request(run, length=30, device="cpu")
    assert of_recipe.stages() == of_run.stages()


def test_length_is_taken_instead_of_data_and_longer_rows_take_more(run):
    short, long = (
        request.stages()[1]
        for request in (read_request(run, length=n, device="cpu") for n in (30, 60))
    )
    assert short.rows.source == "--length"
    assert long.activations == pytest.approx(2 * short.activations, rel=0.15)


def test_a_feature_cache_takes_the_tower_out_of_the_step(run):
    seen = read_request(run, device="cpu")
    cached = read_request(run, device="cpu", overrides=["feature_cache=true"])
    one = seen.stages()[0]
    other = cached.stages()[0]
    assert other.tower == one.tower  # its weights stay, for images that the cache lacks
    assert other.seeing > one.seeing  # 32 images at a time while the cache is filled


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("llava", {}, "--base"),
        ("iaa", {"base": "BASE", "vision": "TOWER"}, "graft.config.layers"),
        ("demo-iaa", {"base": "BASE", "vision": "TOWER"}, "--length"),
        ("nothing", {}, "no recipe"),
        ("llava", {"recipe": "iaa"}, "leave --recipe out"),
    ],
)
def test_what_is_missing_is_named(shared, target, options, words):
    places = {"BASE": str(shared / "base"), "TOWER": str(shared / "tower")}
    options = {key: places.get(value, value) for key, value in options.items()}
    with pytest.raises(UsageError, match=words):
        read_request(target, **options)
