"""State of the optimizers, counted by hand and by a real one."""

from __future__ import annotations

import torch
from torch import nn

from mmgraft.training.memory.estimate import scratch_bytes, state_bytes


def _model() -> nn.Module:
    return nn.ModuleDict(
        {
            "table": nn.Embedding(100, 64),  # 6400 numbers
            "linear": nn.Linear(64, 100),  # 6400, and a bias of 100
            "large": nn.Linear(400, 300, bias=False),  # 120000
        }
    )


def test_adamw_keeps_two_fp32_numbers_for_each():
    model = _model()
    trained = list(model.parameters())
    counted = state_bytes(model, trained, "adamw", "cpu")
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [
        tensor
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    ]
    assert counted == sum(one.numel() * 4 for one in moments) == 8 * (6400 + 6500 + 120000)


def test_in_8_bits_small_tensors_and_embeddings_stay_whole():
    model = _model()
    large = 2 * 120000 + 8 * 469  # 120000 / 256 = 468.75
    linear = 2 * 6400 + 8 * 25
    whole = 8 * (6400 + 100)
    trained = list(model.parameters())
    assert state_bytes(model, trained, "adamw_8bit", "cuda") == large + linear + whole
    # Pages of the large one lie in main memory; there are none without a card.
    assert state_bytes(model, trained, "paged_adamw_8bit", "cuda") == linear + whole
    assert state_bytes(model, trained, "paged_adamw_8bit", "cpu") == large + linear + whole


def test_a_step_holds_roots_of_all_on_cuda_and_of_one_elsewhere():
    trained = list(_model().parameters())
    assert scratch_bytes(trained, "adamw", "cuda") == 0  # one kernel does all of the step
    assert scratch_bytes(trained, "adamw", "cpu") == 2 * 4 * 120000
    assert scratch_bytes(trained, "adamw_8bit", "cuda") == 0
    assert scratch_bytes([], "adamw", "cpu") == 0
