"""Bytes that live, counted by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mmgraft.training.memory.simulation import Ledger

KB = 1000  # of 4 bytes each below: tensors of 250 fp32 numbers


def test_a_tensor_counts_while_it_lives_and_a_view_of_it_not():
    with FakeTensorMode(), Ledger() as ledger:
        one = torch.empty(250)
        view = one.view(25, 10).t()
        assert ledger.now == KB
        two = one + 1
        assert ledger.now == 2 * KB
        del one, two
        assert ledger.now == KB  # the view still holds the first
        del view
        assert (ledger.now, ledger.peak) == (0, 2 * KB)


def test_what_was_there_before_is_not_counted():
    with FakeTensorMode():
        weight = torch.empty(250)
        with Ledger([weight]) as ledger:
            weight.add_(1)
            weight.view(10, 25)
        assert (ledger.now, ledger.peak) == (0, 0)


def test_backward_frees_what_forward_kept_and_leaves_gradients():
    with FakeTensorMode():
        layer = nn.Linear(10, 10, bias=False)
        with Ledger(layer.parameters()) as ledger:
            x = torch.empty(25, 10)  # 1000 bytes
            out = layer(x).relu().sum()  # relu keeps its result; the linear keeps x
            assert ledger.now == KB + KB + 4
            out.backward()
            del out
            assert ledger.now == KB + 10 * 10 * 4  # x and the gradient of the weight


def test_a_recomputed_layer_keeps_its_input_alone():
    with FakeTensorMode():
        layer = nn.Sequential(nn.Linear(10, 10), nn.Sigmoid(), nn.Linear(10, 10), nn.Sigmoid())
        kept = []
        for recompute in (False, True):
            with Ledger(layer.parameters()) as ledger:
                x = torch.empty(25, 10, requires_grad=True)
                before = ledger.now
                out = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
                kept.append(ledger.now - before)
                out.sum().backward()
                del out
        assert kept == [2 * KB, KB]  # two sigmoids' results, or the last one alone


def test_whole_numbers_have_values_and_floating_ones_none():
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        mask = torch.zeros(4, 5, dtype=torch.long)
        mask[1, 2:] = 1
        assert int(mask.sum()) == 3
        huge = torch.empty(1 << 40)  # 4 TiB, were it real
        assert ledger.now > 1 << 42
        del huge
        hidden = torch.empty(4, 5, 8)
        assert hidden[mask == 1].shape == (3, 8)
