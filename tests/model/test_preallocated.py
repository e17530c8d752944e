"""A slot that grows in place holds what a dynamic layer holds, whatever is done to it between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from mmgraft.model.cache import PreallocatedLayer


def states(length: int, seed: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 3, length, 4, generator=draw) for _ in range(2))  # type: ignore[return-value]


def rows_of(layer: Any) -> int:
    return layer.keys.shape[0]


STEPS: dict[str, Any] = {
    "token": lambda layer, n: layer.update(*states(1, n, rows_of(layer))),
    "chunk": lambda layer, n: layer.update(*states(70, n, rows_of(layer))),
    "crop": lambda layer, n: layer.crop(-min(n % 3, layer.get_seq_length() - 1)),
    "reorder": lambda layer, n: layer.reorder_cache(torch.arange(rows_of(layer)).flip(0)),
    "repeat": lambda layer, n: layer.batch_repeat_interleave(2) if rows_of(layer) < 5 else None,
    "select": lambda layer, n: layer.batch_select_indices(torch.tensor([0])),
    "offload": lambda layer, n: (layer.offload(), layer.prefetch()),
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=12))
def test_it_holds_what_a_dynamic_layer_holds(steps: list[str]) -> None:
    layers = PreallocatedLayer(), DynamicLayer()
    with torch.no_grad():
        for layer in layers:
            layer.update(*states(5, 0))
        shown = []
        for number, step in enumerate([*steps, "token", "token"]):
            for layer in layers:
                STEPS[step](layer, number)
            ours, plain = layers
            assert torch.equal(ours.keys, plain.keys), step
            assert torch.equal(ours.values, plain.values), step
            assert ours.get_seq_length() == plain.get_seq_length()
            shown.append((ours.keys, plain.keys))
    for ours, plain in shown:  # what was handed out earlier has not been written over
        assert torch.equal(ours, plain)


@torch.no_grad()
def test_a_token_copies_nothing() -> None:
    layer = PreallocatedLayer()
    layer.update(*states(5, 0))
    first, _ = layer.update(*states(1, 1))
    for number in range(60):
        last, _ = layer.update(*states(1, number))
    assert last.data_ptr() == first.data_ptr()
    assert last.shape[-2] == 66


@torch.no_grad()
def test_a_copy_of_a_cache_goes_its_own_way() -> None:
    layer = PreallocatedLayer()
    layer.update(*states(5, 0))
    layer.update(*states(1, 1))
    other = copy.deepcopy(layer)
    layer.update(*states(1, 2))
    other.update(*states(1, 3))
    assert torch.equal(layer.keys[:, :, 6:], states(1, 2)[0])
    assert torch.equal(other.keys[:, :, 6:], states(1, 3)[0])
    assert torch.equal(layer.keys[:, :, :6], other.keys[:, :, :6])


def test_gradients_reach_every_token() -> None:
    layer, tokens = PreallocatedLayer(), [states(1, number) for number in range(4)]
    for keys, values in tokens:
        layer.update(keys.requires_grad_(), values)
    layer.keys.square().sum().backward()  # type: ignore[union-attr]
    for keys, _ in tokens:
        torch.testing.assert_close(keys.grad, 2 * keys)


@pytest.mark.parametrize("first", ["inference", "plain"])
def test_tensors_of_inference_mode_are_not_written_outside_it(first: str) -> None:
    layer = PreallocatedLayer()
    modes = torch.inference_mode, torch.no_grad
    for number, mode in enumerate(modes if first == "inference" else modes[::-1]):
        with mode():
            layer.update(*states(5, number))
            layer.update(*states(1, 10 + number))
    assert layer.get_seq_length() == 12
