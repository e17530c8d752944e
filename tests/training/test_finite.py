"""nan and inf: noticed in the step itself, its rows named, and the state before it kept exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from mmgraft.training import checkpoint
from mmgraft.training.callbacks.stopping import (
    FiniteWatch,
    NotFinite,
    RandomState,
    is_finite,
    named,
)
from mmgraft.training.run import plan_training, train
from mmgraft.training.trainer import GraftTrainer
from tiny_runs import losses, make_run, write_recipe

NAN, INF = float("nan"), float("inf")

# 9 rows with a picture, 2 a batch, 2 batches a step: 3 steps an epoch; dropout draws numbers.
STAGE = {
    "name": "tune",
    "train": ["projector", "graft"],
    "lr": 1e-3,
    "epochs": 2,
    "batch_size": 2,
    "accumulate": 2,
}


def make(parts: Path, run: Path, **recipe) -> Path:
    make_run(parts, run, "iaa")
    write_recipe(run, parts, "iaa", [STAGE], **{"save_every": None, **recipe})
    return run


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> list[list[str]]:
    """Make the first loss of a step what it should not be; gives the rows of that batch."""
    rows: list[list[str]] = []
    original = GraftTrainer.compute_loss

    def spoilt(self, model, inputs, *args, **kwargs):
        whole = model.forward

        def forward(**given):
            outputs = whole(**given)
            if self.state.global_step + 1 == step and not rows:
                rows.append(list(self._about["rows"]))
                outputs.loss = outputs.loss * value
            return outputs

        model.forward = forward
        try:
            return original(self, model, inputs, *args, **kwargs)
        finally:
            model.forward = whole

    monkeypatch.setattr(GraftTrainer, "compute_loss", spoilt)
    return rows


@pytest.fixture(scope="module")
def whole(dropout_parts, tmp_path_factory) -> Path:
    run = make(dropout_parts, tmp_path_factory.mktemp("whole") / "run")
    train(plan_training(run))
    return run


@pytest.mark.parametrize(("step", "value", "save_every"), [(2, NAN, None), (4, INF, 1)])
def test_the_run_stops_before_the_step_and_goes_on_to_the_bit(
    dropout_parts, tmp_path, whole, monkeypatch, step, value, save_every
):
    """Step 4 is the first of an epoch, where the loader has drawn a number by then."""
    run = make(dropout_parts, tmp_path / "run", save_every=save_every)
    with monkeypatch.context() as patch:
        rows = spoil(patch, step, value)
        with pytest.raises(NotFinite) as stopped:
            train(plan_training(run))
    said = str(stopped.value)
    assert stopped.value.exit_code == 1
    assert f"became {value} in step {step}, on 2 rows:" in said
    assert len(rows[0]) == 2
    assert [line.strip() for line in said.splitlines()[1:3]] == rows[0]
    assert all(f"{dropout_parts / 'rows.jsonl'}, line " in row for row in rows[0])
    assert f"saved after step {step - 1};" in said
    assert f"mmgraft train {run} --resume" in said
    saved = checkpoint.checkpoints(run / "checkpoints" / "1-tune")[-1]
    assert checkpoint.step_of(saved) == step - 1
    torch.manual_seed(4321)
    train(plan_training(run, resume=True))
    mine, wanted = load_file(run / "graft.safetensors"), load_file(whole / "graft.safetensors")
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    assert losses(run) == losses(whole)


class Look(TrainerCallback):
    """Does something with the model when a step ends."""

    def __init__(self, do) -> None:
        self.do = do

    def on_step_end(self, args, state, control, model=None, **_):
        self.do(model)


def test_a_gradient_that_overflows_under_a_finite_loss_moves_nothing(parts, tmp_path):
    """Were the loss alone looked at, the step would be taken and the weights saved as nan."""
    run = make(parts, tmp_path / "run", save_every=1)
    before = load_file(run / "graft.safetensors")

    def hook(model):
        bias = model.workflow().projector.mlp[2].bias
        bias.register_hook(lambda gradient: gradient * INF)

    with pytest.raises(NotFinite, match=r"gradient .* in step 2, .* on 4 rows:") as stopped:
        train(plan_training(run), display=lambda *_: [Look(hook)])
    assert "saved after step 1;" in str(stopped.value)
    (saved,) = checkpoint.checkpoints(run / "checkpoints" / "1-tune")
    assert checkpoint.step_of(saved) == 1
    tensors = load_file(saved / checkpoint.TENSORS)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    after = load_file(run / "graft.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_nothing_is_saved_before_the_first_step_or_of_weights_that_are_lost(
    parts, tmp_path, monkeypatch
):
    run = make(parts, tmp_path / "first")
    with monkeypatch.context() as patch:
        spoil(patch, 1, NAN)
        with pytest.raises(NotFinite, match="as it was before its first step"):
            train(plan_training(run))
    assert checkpoint.checkpoints(run / "checkpoints" / "1-tune") == []

    run = make(parts, tmp_path / "lost")

    def lose(model):
        model.workflow().projector.mlp[2].bias.data.fill_(NAN)

    with pytest.raises(NotFinite, match="not finite either, so they are not saved"):
        train(plan_training(run), display=lambda *_: [Look(lose)])
    assert checkpoint.checkpoints(run / "checkpoints" / "1-tune") == []


def test_an_evaluation_that_is_not_finite_stops_too(parts, tmp_path, monkeypatch):
    data = [{"path": str(parts / "rows.jsonl"), "images": str(parts / "images"), "limit": 3}]
    run = make(parts, tmp_path / "run", eval_data=data, eval_every=2)
    original = FiniteWatch.note_evaluated

    def spoilt(self, rows, loss):
        original(self, rows, loss.fill_(NAN) if any("id 2)" in row for row in rows) else loss)

    monkeypatch.setattr(FiniteWatch, "note_evaluated", spoilt)
    with pytest.raises(NotFinite, match=r"eval_data became nan after step 2 .* on 1 row:") as said:
        train(plan_training(run))
    assert "(id 2)" in str(said.value)
    assert "saved after step 2;" in str(said.value)


def test_only_the_batches_that_are_odd_are_named() -> None:
    watch = FiniteWatch("s", torch.device("cpu"))
    for rows, loss in [(["a", "b"], 1.0), (["c"], INF), (["d"], NAN), (["e"], 2.0)]:
        watch.note(rows, torch.tensor(loss))
    with pytest.raises(NotFinite, match=r"became inf in step 7, on 2 rows:\n  c\n  d$"):
        watch.check_step(7, torch.tensor(NAN), 1)
    watch.note(["a"], torch.tensor(1.0))
    watch.check_step(8, 3.0, 1)  # nothing is left of the step before


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_every_kind_of_a_number_that_is_not_finite_is_seen(value) -> None:
    watch = FiniteWatch("s", torch.device("cpu"))
    for norm in (value, torch.tensor(value)):
        for rows in ([], ["a"]):  # read alone, or in one wait with the losses
            if rows:
                watch.note(rows, torch.tensor(1.0))
            with pytest.raises(NotFinite, match=f"gradient of stage 's' became {value} in step 9"):
                watch.check_step(9, norm, 1)
    watch.note(["b"], torch.tensor(value))
    with pytest.raises(NotFinite, match=f"loss of stage 's' became {value} .* on 1 row:\n  b$"):
        watch.check_step(9, 1.0, 1)
    watch.note_evaluated(["c"], torch.tensor(1.0))
    watch.note_evaluated(["d"], torch.tensor(value))
    with pytest.raises(NotFinite, match=f"eval_data became {value} .* on 1 row:\n  d$"):
        watch.check_evaluation(9, value, 1)
    model = nn.Linear(2, 1)
    assert is_finite(model)
    model.bias.data.fill_(value)
    assert not is_finite(model)
    model.bias.requires_grad_(False)
    assert is_finite(model)  # what a base has itself is none of the training's


def test_many_rows_are_counted_not_listed() -> None:
    said = named([f"row {number}" for number in range(40)] + ["row 0"])
    assert said.startswith("40 rows:\n  row 0\n")
    assert said.endswith("\n  row 15\n  and 24 more")


def test_random_numbers_are_put_back() -> None:
    import random

    import numpy as np

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    state = RandomState.now(3)
    first = draw()
    assert draw() != first
    state.restore()
    assert draw() == first
