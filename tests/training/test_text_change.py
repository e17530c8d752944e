"""A run that trains its base says, and measures, how far its text has moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmgraft.model.files.graft_file import GraftFile
from mmgraft.training.callbacks import text_change
from mmgraft.training.callbacks.text_change import BEFORE, compare, forgotten, is_due
from mmgraft.training.run import plan_training, train
from tiny_runs import make_parts, make_rows, make_run, write_recipe


def test_the_divergence_is_that_of_the_definition() -> None:
    before = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    after = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    change = compare({"0": before.log()}, {"0": after.log()})
    wanted = 0.5 * torch.log(torch.tensor(2.0)) - 0.25 * torch.log(torch.tensor(2.0))
    assert change.mean_kl == pytest.approx(float(wanted) / 2, rel=1e-5)
    assert change.same_choice == 0.5
    assert change.positions == 2


@pytest.mark.parametrize("base", ["full", "frozen"])
def test_a_trained_base_is_measured_and_a_frozen_one_is_not(tmp_path: Path, base: str) -> None:
    parts = make_parts(tmp_path)
    run = make_run(parts, tmp_path / "run", "llava")
    make_rows(parts)
    groups = ["projector", "base"] if base == "full" else ["projector"]
    stage = {"name": "one", "train": groups, "lr": 1e-2, "max_steps": 3, "batch_size": 2}
    write_recipe(run, parts, "llava", [stage], base=base)
    said: list[str] = []
    train(plan_training(run, device="cpu"), announce=said.append)
    results = GraftFile.read(run).results or {}
    told = [line for line in said if "text may change" in line]
    if base == "frozen":
        assert (told, results) == ([], {})
        assert not (run / BEFORE).exists()
        return
    assert len(told) == 1
    assert not is_due(run)
    assert forgotten(results) is None  # what another training will not be said to have done
    assert results["text_change"]["mean_kl"] > 1e-4, "three steps at this rate move the text"


def test_a_kill_before_it_is_measured_does_not_lose_it(tmp_path: Path, monkeypatch) -> None:
    parts = make_parts(tmp_path)
    run = make_run(parts, tmp_path / "run", "llava")
    stage = {"name": "one", "train": ["projector", "base"], "lr": 1e-2, "max_steps": 1}
    write_recipe(run, parts, "llava", [stage], base="full")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(text_change, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            train(plan_training(run, device="cpu"))
    assert is_due(run)
    said: list[str] = []
    assert train(plan_training(run, device="cpu", resume=True), announce=said.append) == []
    assert "mean_kl" in (GraftFile.read(run).results or {})["text_change"]
    assert [line for line in said if "text may change" in line]
    assert train(plan_training(run, device="cpu", resume=True)) == []
