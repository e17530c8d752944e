"""Kernels of a CPU's products: one for each shape in bf16, none elsewhere."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmgraft.training.memory.kernels import KERNEL, MOST, kernel_bytes
from mmgraft.training.memory.ledger import Ledger


def made(*sizes: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> int:
    with Ledger() as ledger:
        for rows, middle, columns in sizes:
            torch.mm(torch.ones(rows, middle, dtype=dtype), torch.ones(middle, columns).to(dtype))
    return ledger.kernels.count


def test_a_shape_has_one_kernel_however_often_it_is_met() -> None:
    assert made((3, 4, 5), (3, 4, 5)) == 1
    assert made((3, 4, 5), (7, 4, 5)) == 2
    assert made((3, 4, 5), (7, 4, 5), dtype=torch.float32) == 0


def test_attention_has_kernels_for_each_length_whatever_the_number_of_heads() -> None:
    def of(*shapes: tuple[int, int]) -> int:
        with Ledger() as ledger:
            for heads, length in shapes:
                x = torch.ones(1, heads, length, 8, dtype=torch.bfloat16, requires_grad=True)
                F.scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()
        return ledger.kernels.count

    once = of((2, 10))
    assert once > 0
    assert of((2, 10), (4, 10)) == once
    assert of((2, 10), (2, 11)) == 2 * once


def test_the_store_of_kernels_is_full_some_time() -> None:
    assert kernel_bytes(30, 2) == 60 * KERNEL
    assert kernel_bytes(30, 10**6) == MOST * KERNEL
