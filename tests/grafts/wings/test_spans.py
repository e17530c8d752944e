"""Pieces of a mask that are causal: found where they are there, refused where they are not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mmgraft.grafts.wings.spans import causal_spans, over_spans


def mask_of(segments: list[list[int]], filled: str) -> tuple[Tensor, Tensor]:
    """A mask ``(b, 1, s, s)`` of rows in segments (0: padding), and the padding ``(b, s)``.

    Padded queries see nothing, everything, or the real keys before them: bases differ.
    """
    numbers = torch.tensor(segments)
    real = numbers != 0
    causal = torch.ones(numbers.shape[1], numbers.shape[1], dtype=torch.bool).tril()
    mask = causal & (numbers[:, :, None] == numbers[:, None, :]) & real[:, None, :]
    if filled == "everything":
        mask |= ~real[:, :, None]
    elif filled == "before":
        mask |= ~real[:, :, None] & causal & real[:, None, :]
    return mask[:, None], ~real


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


@st.composite
def batches(draw: st.DrawFn) -> list[list[int]]:
    length = draw(st.integers(1, 9))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row: list[int] = []
        for number in range(draw(st.integers(1, 3))):
            row += [0] * draw(st.integers(0, 2)) + [number + 1] * draw(st.integers(0, 4))
        rows.append((row + [0] * length)[:length])
    return rows


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(["nothing", "everything", "before"]))
def test_pieces_give_what_the_mask_gives(segments: list[list[int]], filled: str) -> None:
    mask, padding = mask_of(segments, filled)
    spans = causal_spans(mask, padding)
    assert spans is not None
    draw = torch.Generator().manual_seed(0)
    shape = len(segments), 2, len(segments[0]), 4
    query, key, value = (torch.randn(shape, generator=draw, requires_grad=True) for _ in range(3))
    ours = over_spans(attend, spans, query, key, value)
    visible = mask | padding[:, None, :, None]
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=visible).transpose(1, 2)
    theirs = torch.where(padding[:, :, None, None], 0.0, theirs)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(ours.shape, generator=draw)
    if ours.requires_grad:
        found = torch.autograd.grad(ours, (query, key, value), weight, allow_unused=True)
        expected = torch.autograd.grad(theirs, (query, key, value), weight)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one if one is not None else torch.zeros(shape), other)


def test_two_spans_of_one_row() -> None:
    mask, padding = mask_of([[0, 1, 1, 2, 2, 2, 0]], "before")
    assert causal_spans(mask, padding) == [[(1, 3), (3, 6)]]


def test_padding_that_is_seen_is_left_to_the_kernel() -> None:
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    padding = torch.tensor([[False, False, True, False, False]])
    assert causal_spans(mask, padding) is None
    assert causal_spans(mask, ~padding) is None


def sliding(length: int, window: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)


def prefix(length: int, seen: int) -> Tensor:
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:, :seen] = True
    return mask


def hole(length: int) -> Tensor:
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[4, 2] = False
    return mask


@pytest.mark.parametrize("mask", [sliding(6, 3), prefix(6, 2), hole(6), sliding(6, 3).float()])
def test_other_masks_are_left_to_the_kernel(mask: Tensor) -> None:
    assert causal_spans(mask[None, None], torch.zeros(1, 6, dtype=torch.bool)) is None


def test_a_mask_that_is_different_for_heads_is_left_to_the_kernel() -> None:
    mask = torch.ones(1, 2, 4, 4, dtype=torch.bool).tril()
    assert causal_spans(mask, torch.zeros(1, 4, dtype=torch.bool)) is None
    assert causal_spans(mask[:, :1, 2:], torch.zeros(1, 2, dtype=torch.bool)) is None
