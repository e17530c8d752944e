"""The Trainer of a stage: exact losses and gradients, rates, frozen parts, fp32 parameters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from mmgraft.errors import MMGraftError
from mmgraft.training.run import plan_training
from mmgraft.training.session import Session
from mmgraft.training.trainer import GraftTrainer
from tiny_runs import losses, make_run, write_recipe

TUNE = {"name": "tune", "train": ["projector", "graft"], "lr": 1e-3, "batch_size": 2}


class Watch(TrainerCallback):
    """Keeps gradients before each step and calls `look` with the model."""

    def __init__(self, look: Any = lambda model: None) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.look = look
        self.optimizer: Any = None

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        self.optimizer = optimizer.optimizer
        self.gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        self.look(model)


def run_one(parts: Path, tmp_path: Path, stage: dict, method: str = "iaa", look=None, **recipe):
    run = make_run(parts, tmp_path / "run", method)
    write_recipe(run, parts, method, [stage], save_every=None, **recipe)
    session = Session(plan_training(run), lambda text: None)
    watch = Watch(look or (lambda model: None))
    session.run_stage(0, [watch])
    return run, session, watch


def rows_of(session: Session) -> list[dict[str, torch.Tensor]]:
    """Every row of the stage as a batch of its own."""
    from mmgraft.data.batches.collate import Collator
    from mmgraft.data.batches.dataset import RowDataset

    stage = session.plan.stages[0]
    data = RowDataset(session.plan.rows[0], session.processor, text_rows=stage.text_rows)
    collator = Collator(session.processor)
    return [collator([data[index]]) for index in range(len(data))]


def explicit_gradients(session: Session, rows: list[dict], workflow: Any) -> tuple[Any, float]:
    """Mean cross-entropy over the supervised tokens of some rows, each run alone."""
    model = session.model
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for row in rows:
        row = {k: v for k, v in row.items() if k not in ("row_ids", "workflow")}
        tokens = int((row["labels"] != -100).sum())
        total = total + model(**row, workflow=workflow(row)).loss * tokens
        count += tokens
    loss = total / count
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients, loss.item()


@pytest.mark.parametrize("text_rows", ["skip", "graft"])
def test_one_step_is_the_mean_over_all_supervised_tokens(parts, tmp_path, text_rows):
    # One step over the whole data in unequal batches; the rate is too small to move anything.
    stage = {
        **TUNE,
        "lr": 1e-30,
        "batch_size": 4,
        "accumulate": 3,
        "max_steps": 1,
        "clip_norm": 0,
        "text_rows": text_rows,
    }
    run, session, watch = run_one(parts, tmp_path, stage)
    rows = rows_of(session)
    assert len({int((row["labels"] != -100).sum()) for row in rows}) > 2
    wanted, loss = explicit_gradients(session, rows, lambda row: "mm")
    assert losses(run)[0][2] == pytest.approx(loss, abs=1e-5)
    (found,) = watch.gradients
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("text_rows", "wanted"),
    [("skip", ["see", "text", "see"]), ("graft", ["see", "see", "see"])],
)
def test_each_row_trains_its_workflow(text_rows, wanted):
    """LLaVA's graft does nothing to a row of text, so that no gradient tells these apart."""
    stage = SimpleNamespace(workflow="see", text_rows=text_rows)
    trainer: Any = SimpleNamespace(stage=stage, _about={"with_image": [True, False, True]})
    assert GraftTrainer._workflows(trainer) == wanted


def test_text_rows_of_a_trained_base_train_it(parts, tmp_path):
    stage = {
        **TUNE,
        "train": ["projector", "base"],
        "lr": 1e-30,
        "batch_size": 4,
        "accumulate": 3,
        "max_steps": 1,
        "clip_norm": 0,
    }
    run, session, watch = run_one(parts, tmp_path, stage, "llava", base="full")
    rows = rows_of(session)
    assert any(not row["mm_token_type_ids"].any() for row in rows)
    wanted, loss = explicit_gradients(
        session, rows, lambda row: "mm" if row["mm_token_type_ids"].any() else "text"
    )
    assert losses(run)[0][2] == pytest.approx(loss, abs=1e-5)
    (found,) = watch.gradients
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_groups_move_at_their_own_rates(parts, tmp_path):
    before: dict[str, torch.Tensor] = {}

    def look(model):
        if not before:
            before.update({n: p.detach().clone() for n, p in model.named_parameters()})

    stage = {
        **TUNE,
        "lr": {"projector": 1e-2, "default": 1e-4},
        "schedule": "constant",
        "max_steps": 1,
    }
    _, session, _ = run_one(parts, tmp_path, stage, look=look)
    # The first step of Adam moves every number with a gradient by the rate itself.
    moved = {
        n: (p.detach() - before[n]).abs().max().item() for n, p in session.model.named_parameters()
    }
    assert moved["workflows.mm.projector.mlp.2.weight"] == pytest.approx(1e-2, rel=1e-2)
    inserted = moved["workflows.mm.graft.layers.0.mlp.up_proj.weight"]
    assert inserted == pytest.approx(1e-4, rel=1e-2)


def test_schedule_and_warmup_act_on_every_rate(parts, tmp_path):
    import json

    stage = {
        **TUNE,
        "lr": {"projector": 8e-3, "graft": 4e-4},
        "schedule": "linear",
        "warmup_steps": 2,
        "max_steps": 4,
    }
    run, _, _ = run_one(parts, tmp_path, stage)
    rates = [json.loads(line)["lr"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [rate["projector"] for rate in rates] == pytest.approx([0, 4e-3, 8e-3, 4e-3])
    assert [rate["graft"] for rate in rates] == pytest.approx([0, 2e-4, 4e-4, 2e-4])


def test_weights_move_at_the_published_rate_under_bf16_autocast(parts, tmp_path):
    # Pure bf16 weights would hardly move: 2e-6 is far below the spacing of bf16 numbers near 0.1.
    before: dict[str, torch.Tensor] = {}

    def look(model):
        if not before:
            before.update({n: p.detach().clone() for n, p in model.named_parameters()})

    stage = {
        **TUNE,
        "train": ["projector", "layers", "norm"],
        "lr": 2e-6,
        "schedule": "constant",
        "max_steps": 100,
    }
    _, session, watch = run_one(parts, tmp_path, stage, look=look, precision="bf16")
    assert len(watch.gradients) == 100
    moved = total = in_bf16 = 0
    for name, parameter in session.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            after = parameter.detach()
            moved += int((after != before[name]).sum())
            in_bf16 += int((after.bfloat16() != before[name].bfloat16()).sum())
            total += after.numel()
    assert total > 10_000
    assert moved / total >= 0.95
    assert in_bf16 / total < 0.5  # else the test would pass for bf16 weights too


def test_frozen_parts_do_not_move_and_stay_in_eval_mode(parts, tmp_path):
    seen: list[bool] = []
    before: dict[str, torch.Tensor] = {}

    def look(model):
        if not before:
            before.update(
                {n: t.clone() for n, t in model.state_dict().items() if ".graft." not in n}
            )
        frozen = [*model.base.modules(), *model.vision_tower.modules()]
        seen.append(any(module.training for module in frozen))
        assert any(module.training for module in model.workflow().graft.modules())

    stage = {**TUNE, "train": ["layers"], "lr": 1e-2, "max_steps": 3}
    _, session, _ = run_one(parts, tmp_path, stage, look=look, precision="bf16")
    assert seen == [False] * 3
    after = session.model.state_dict()
    assert any(name.startswith("base.") for name in before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(parts / "base", dtype=torch.bfloat16)
    ids = torch.tensor([[5, 9, 20, 31]])
    with torch.no_grad():
        assert torch.equal(session.model.eval()(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_checkpointing_changes_no_gradient(parts, tmp_path):
    stage = {**TUNE, "lr": 1e-30, "max_steps": 1, "clip_norm": 0}
    _, _, plain = run_one(parts, tmp_path / "a", stage)
    _, _, again = run_one(parts, tmp_path / "b", {**stage, "gradient_checkpointing": True})
    for name, gradient in plain.gradients[0].items():
        torch.testing.assert_close(again.gradients[0][name], gradient)


def test_a_loss_that_is_not_finite_stops_the_run(parts, tmp_path):
    def look(model):
        model.workflow().projector.mlp[2].bias.data.fill_(float("nan"))

    with pytest.raises(MMGraftError, match="lower lr") as caught:
        run_one(parts, tmp_path, {**TUNE, "max_steps": 5}, look=look)
    assert caught.value.exit_code == 1


def test_eight_bit_optimizer_trains(parts, tmp_path):
    before: dict[str, torch.Tensor] = {}

    def look(model):
        if not before:
            before.update({n: p.detach().clone() for n, p in model.named_parameters()})

    stage = {**TUNE, "optimizer": "paged_adamw_8bit", "max_steps": 2, "schedule": "constant"}
    _, session, watch = run_one(parts, tmp_path, stage, look=look)
    assert watch.optimizer.args.optim_bits == 8
    assert not watch.optimizer.is_paged  # without a card there is nothing to page
    for name, parameter in session.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_evaluation_rows_are_scored_and_written(parts, tmp_path):
    import json

    entry = {"path": str(parts / "rows.jsonl"), "images": str(parts / "images"), "limit": 4}
    stage = {**TUNE, "max_steps": 2}
    run, _, _ = run_one(parts, tmp_path, stage, eval_every=1, eval_data=[entry])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line.get("eval_loss", 0) > 0]) == 2
