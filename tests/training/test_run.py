"""Whole runs: what is refused before anything is loaded, and what a training leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mmgraft.errors import UsageError
from mmgraft.model.modeling import GraftedModel
from mmgraft.recipes.source import load_recipe, shipped_recipes
from mmgraft.training.plan import Plan
from mmgraft.training.run import plan_training, train
from mmgraft.training.session import Session
from mmgraft.training.stage_data import with_template
from tiny_runs import losses, make_run, write_recipe

ALIGN = {"name": "align", "train": ["projector"], "lr": 1e-3, "batch_size": 4, "max_steps": 1}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def run(parts: Path, tmp_path: Path) -> Path:
    made = make_run(parts, tmp_path / "run", "llava")
    write_recipe(made, parts, "llava", [ALIGN])
    return made


def refusal(run: Path, **options) -> str:
    before = sorted(run.rglob("*"))
    with pytest.raises(UsageError) as caught:
        plan_training(run, **options)
    assert sorted(run.rglob("*")) == before
    return str(caught.value)


# Refused before a model is loaded


def test_empty_data_says_what_to_set_and_what_to_give(parts, run):
    write_recipe(run, parts, "llava", [ALIGN, {**ALIGN, "name": "tune", "data": []}], data=[{}])
    message = refusal(run)
    assert f"`data[0].path`, `stages[1].data[0].path` in {run / 'recipe.yaml'}" in message
    assert f"mmgraft train {run} --data FILE --images DIR" in message
    assert "--data align=FILE --data tune=FILE" in message
    plan = plan_training(run, data=[str(parts / "rows.jsonl")], images=str(parts / "images"))
    assert [len(rows) for rows in plan.rows] == [12, 12]


def test_a_run_without_a_recipe_takes_the_methods_own(run):
    (run / "recipe.yaml").unlink()
    message = refusal(run)
    assert f"mmgraft recipes cp llava {run / 'recipe.yaml'}" in message


def test_a_recipe_for_another_method(run):
    assert "recipe for wings" in refusal(run, recipe="wings")


def test_cuda_without_cuda(run):
    if torch.cuda.is_available():
        pytest.skip("has CUDA")
    assert "finds no CUDA" in refusal(run, device="cuda")
    assert "CUDA_VISIBLE_DEVICES" in refusal(run, device="cuda:1")


def test_rows_that_train_nothing(parts, run, tmp_path):
    rows = [json.loads(line) for line in (parts / "rows.jsonl").read_text().splitlines()]
    texts = [row for row in rows if isinstance(row["messages"][0]["content"], str)]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, texts)))
    assert "not one of 3 rows has an image" in refusal(run, data=[str(file)])
    assert plan_training(run, data=[str(file)], overrides=["text_rows=graft"]).skipped == [0]


def test_a_missing_image_names_the_row(run, tmp_path):
    file = tmp_path / "rows.jsonl"
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "gone.png"}]},
        {"role": "assistant", "content": "?"},
    ]
    file.write_text(json.dumps({"id": "x7", "messages": turns}))
    message = refusal(run, data=[str(file)])
    assert "x7" in message
    assert "gone.png" in message


def test_resume_and_restart_are_not_both(run):
    assert "one of them" in refusal(run, resume=True, restart=True)


# What a training leaves behind


def trained(run: Path, **options) -> Plan:
    plan = plan_training(run, **options)
    train(plan)
    return plan


def test_a_trained_base_is_written_with_its_own_fingerprint(parts, tmp_path):
    run = make_run(parts, tmp_path / "run", "llava")
    tune = {**ALIGN, "name": "tune", "train": ["projector", "base"], "max_steps": 2}
    write_recipe(run, parts, "llava", [ALIGN, tune], base="full")
    original = json.loads((run / "graft_config.json").read_text())["base"]
    weights = digest(parts / "base" / "model.safetensors")
    trained(run)
    record = json.loads((run / "graft_config.json").read_text())
    assert record["base_trained"] is True
    assert record["base"]["id"] == "./base"
    assert record["base"]["fingerprint"] != original["fingerprint"]
    assert digest(parts / "base" / "model.safetensors") == weights
    own = AutoModelForCausalLM.from_pretrained(run / "base")
    first = AutoModelForCausalLM.from_pretrained(parts / "base")
    ids = torch.tensor([[5, 9, 20, 31]])
    model = GraftedModel.from_pretrained(run)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, own(input_ids=ids).logits)
        assert not torch.equal(own(input_ids=ids).logits, first(input_ids=ids).logits)


def test_a_second_workflow_begins_as_the_first_and_leaves_it_alone(parts, tmp_path):
    run = make_run(parts, tmp_path / "run", "iaa")
    both = {"train": ["projector", "graft"], "lr": 1e-3, "batch_size": 4, "max_steps": 1}
    stages = [{**both, "name": "instruct"}, {**both, "name": "boxes", "workflow": "grounding"}]
    write_recipe(run, parts, "iaa", stages)
    plan = plan_training(run)
    session = Session(plan, lambda text: None)
    session.run_stage(0, [])
    first = digest(run / "graft.safetensors")
    before = {k: v.clone() for k, v in load_file(run / "graft.safetensors").items()}
    session.run_stage(1, [])
    assert digest(run / "graft.safetensors") == first
    second = run / "workflows" / "grounding"
    assert json.loads((second / "graft_config.json").read_text())["workflow"] == "grounding"
    # One step of Adam at 1e-3 from the first workflow's weights: near, but not the same.
    after = load_file(second / "graft.safetensors")
    assert max((after[k] - before[k]).abs().max() for k in before) < 2e-3
    assert any(not torch.equal(after[k], before[k]) for k in before)
    model = GraftedModel.from_pretrained(run)
    model.add_workflow("grounding", second)
    assert model.names == ["mm", "grounding"]


def test_a_4_bit_base_is_trained_through_and_not_saved(parts, tmp_path):
    pytest.importorskip("bitsandbytes")
    run = make_run(parts, tmp_path / "run", "wings")
    stage = {"train": ["projector", "learners"], "lr": 1e-2, "batch_size": 4, "max_steps": 2}
    write_recipe(
        run,
        parts,
        "wings",
        [{**stage, "name": "tune", "gradient_checkpointing": True}],
        quantization="nf4",
        precision="bf16",
    )
    before = load_file(run / "graft.safetensors")
    session = Session(plan_training(run), lambda text: None)
    session.run_stage(0, [])
    assert session.model is not None
    assert session.model.quantized
    after = load_file(run / "graft.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".visual." in name for name in moved)
    assert any("projector" in name for name in moved)
    assert not (run / "base").exists()
    assert json.loads((run / "graft_config.json").read_text())["base"]["id"] == str(parts / "base")


def test_the_feature_cache_changes_no_loss(parts, tmp_path):
    stage = {**ALIGN, "max_steps": 4}
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    for folder in (plain, cached):
        make_run(parts, folder, "llava")
        write_recipe(folder, parts, "llava", [stage], feature_cache=folder is cached)
        trained(folder)
    wanted = [loss for *_, loss in losses(plain)]
    assert [loss for *_, loss in losses(cached)] == pytest.approx(wanted, abs=1e-5)
    assert list((cached / "features").glob("*/*.safetensors"))


def test_the_template_of_a_stage_is_its_own(parts, tmp_path):
    run = make_run(parts, tmp_path / "run", "llava")
    stages = [{**ALIGN, "template": "plain"}, {**ALIGN, "name": "chat"}]
    write_recipe(run, parts, "llava", stages)
    session = Session(plan_training(run), lambda text: None)
    session.run_stage(0, [])
    read = [with_template(session.processor, stage.template) for stage in session.plan.stages]
    kinds = [processor.template.kind for processor in read]
    assert kinds == ["plain", "chat"]
    assert json.loads((run / "graft_config.json").read_text())["template"]["kind"] == "chat"


@pytest.mark.parametrize("broken", ["{% if %}", None])
def test_the_template_of_a_later_stage_is_read_before_the_first(parts, tmp_path, broken):
    path = tmp_path / "own.jinja"
    if broken is not None:
        path.write_text(broken)
    run = make_run(parts, tmp_path / "run", "llava")
    stages = [ALIGN, {**ALIGN, "name": "tune", "template": str(path)}]
    write_recipe(run, parts, "llava", stages)
    with pytest.raises(UsageError, match=r"own\.jinja"):
        plan_training(run)  # what --dry-run shows


class Writer:
    """Stands for TensorBoard's, and keeps what it is told."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.scalars: dict[str, list[float]] = {}
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(name, []).append(value)

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


def test_tensorboard_gets_losses_and_every_rate(parts, tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr("mmgraft.training.run.check_packages", lambda *_: None)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr(Writer, "made", [])
    run = make_run(parts, tmp_path / "run", "iaa")
    stage = {**ALIGN, "train": ["projector", "graft"], "lr": {"projector": 1e-3, "default": 1e-4}}
    write_recipe(run, parts, "iaa", [stage], tracking="tensorboard")
    trained(run)
    (writer,) = Writer.made
    assert writer.log_dir == str(run / "tracking" / "1-align")
    assert writer.scalars["train/loss"] == [losses(run)[0][2]]
    assert writer.scalars["train/lr/projector"] == [pytest.approx(1e-3)]
    assert writer.scalars["train/lr/graft"] == [pytest.approx(1e-4)]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


SMALL = [
    "max_length=512",
    "batch_size=2",
    "accumulate=2",
    "warmup_ratio=null",
    "warmup_steps=0",
]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_trains(parts, tmp_path, name):
    recipe = load_recipe(name)
    config = dict(recipe.graft.config)
    if config.get("layers", "all") != "all":  # for bases with more layers
        config["layers"] = [1, 3]
    if "rank" in config:
        config["rank"] = 4
    run = make_run(parts, tmp_path / "run", recipe.method, **config)
    plan = plan_training(
        run,
        recipe=name,
        data=[str(parts / "rows.jsonl")],
        images=str(parts / "images"),
        overrides=[f"stages.*.{setting}" for setting in SMALL],
        max_steps=2,
        device="cpu",
    )
    results = train(plan)
    assert [(result.stage, result.steps) for result in results] == [
        (stage.name, 2) for stage in recipe.stages
    ]
    assert all(result.loss is not None and 0 < result.loss < 20 for result in results)
    assert (run / "base").exists() == (recipe.base == "full")
    assert (run / "workflows" / "grounding").exists() == (name in ("iaa-8b-14", "grounding"))
