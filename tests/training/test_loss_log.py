"""Losses between two logs: a checkpoint keeps them, for each rank, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmgraft.training.callbacks.metrics import EvalSum, LossSum, counted

CPU = torch.device("cpu")


def summed(*losses: float) -> LossSum:
    made = LossSum()
    for loss in losses:
        made.add(torch.tensor(loss))
    return made


def test_a_sum_goes_on_to_the_bit(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    whole = summed(0.1, 0.7, 0.3)
    before = summed(0.1, 0.7)
    before.step = 5
    before.write(folder, before.value())
    after = LossSum()
    after.read(folder, rank=0, ranks=1, device=CPU)
    after.add(torch.tensor(0.3))
    assert after.step == 5
    assert torch.equal(after.value(), whole.value())
    after.restore(7)  # the step that was begun is not taken
    assert torch.equal(after.value(), before.value())


def test_ranks_have_their_own_and_another_number_of_them_the_mean(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    LossSum(step=1).write(folder, torch.tensor([1.0, 3.0]))
    for rank, ranks, wanted in ((0, 2, 1.0), (1, 2, 3.0), (0, 1, 2.0), (3, 4, 2.0)):
        found = LossSum()
        found.read(folder, rank, ranks, CPU)
        assert float(found.value()) == pytest.approx(wanted)


def test_a_checkpoint_without_them_begins_at_nothing(tmp_path: Path) -> None:
    found = LossSum()
    found.read(tmp_path / "checkpoint-2", 0, 1, CPU)
    assert float(found.value()) == 0


def test_only_the_step_that_stands_is_restored() -> None:
    found = summed(1.0)
    found.keep(3)
    found.add(torch.tensor(2.0))
    found.restore(4)  # an evaluation failed after step 4, whose loss counts
    assert float(found.value()) == 3
    found.restore(3)
    assert float(found.value()) == 1
    found.begin(3)
    assert (found.step, float(found.value())) == (3, 0)


def test_an_evaluation_is_the_mean_over_tokens_however_they_stand_in_batches() -> None:
    """A batch that teaches nothing may have a loss of nan: a mean over no token."""
    found = EvalSum()
    for loss, learned in ((2.0, 3), (5.0, 1), (float("nan"), 0)):
        labels = torch.full((2, 4), -100)
        labels[0, 1 : 1 + learned] = 7
        labels[1, 0] = 7  # nobody predicts a first token
        mean, count = counted(torch.tensor(loss), labels)
        assert (float(mean), int(count)) == (loss if learned else 0, learned)
        found.add(mean, count)
    total, tokens = found.take(CPU)
    assert (float(total), int(tokens)) == (2.0 * 3 + 5.0, 4)
    assert [float(one) for one in found.take(CPU)] == [0, 0]
    assert float(counted(torch.tensor(float("inf")), torch.tensor([[1, 2]]))[0]) == float("inf")
