"""The order of rows depends on seed and epoch, and on nothing that went before."""

from __future__ import annotations

import random

import torch

from mmgraft.data.batches.sampler import EpochSampler


def order(sampler: EpochSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_row_once_and_another_order_every_epoch():
    sampler = EpochSampler(50, seed=3)
    first, second = order(sampler, 0), order(sampler, 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert len(sampler) == 50


def test_the_order_is_that_of_torch_without_a_list_of_it():
    generator = torch.Generator().manual_seed((3 << 20) + 2)
    found = order(EpochSampler(40, seed=3), 2)
    assert found == torch.randperm(40, generator=generator).tolist()
    assert all(type(at) is int for at in found)


def test_the_order_is_found_again_whatever_random_numbers_were_drawn():
    before = order(EpochSampler(50, seed=3), 4)
    torch.manual_seed(99)
    random.seed(99)
    torch.rand(7)
    assert order(EpochSampler(50, seed=3), 4) == before
    assert order(EpochSampler(50, seed=4), 4) != before
