"""Models without weights: what theirs would take."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from mmgraft.anatomy import get_path
from mmgraft.training.memory.simulation import FourBitLinear, count_of, meta_model, weights_of
from tiny import HIDDEN, VOCAB_SIZE, tiny_config, tiny_model
from tiny_records import tiny_record


def test_weights_by_dtype_are_those_of_the_real_base_and_of_the_projector():
    model = meta_model(tiny_record("llava"), tiny_config("llama"), 16, torch.bfloat16)
    real = sum(p.numel() for p in tiny_model("llama").parameters())
    projector = 16 * HIDDEN + HIDDEN + HIDDEN * HIDDEN + HIDDEN
    assert weights_of(model) == {"bfloat16": 2 * real, "float32": 4 * projector}
    assert count_of(model) == real + projector


def test_tied_weights_count_once():
    model = meta_model(tiny_record("llava"), tiny_config("qwen2"), 16, torch.bfloat16)
    real = sum(p.numel() for p in tiny_model("qwen2").parameters())
    assert weights_of(model)["bfloat16"] == 2 * real


def test_iaa_with_its_own_embedding_and_head():
    config = tiny_config("llama")
    small, large = (
        count_of(meta_model(tiny_record("iaa", **c), config, 16, torch.bfloat16))
        for c in (
            {"layers": [1], "embedding": False, "head": False},
            {"layers": [1], "embedding": True, "head": True},
        )
    )
    assert large - small == 2 * VOCAB_SIZE * HIDDEN


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_in_4bit_the_numbers_stay_and_head_and_embedding_keep_their_dtype(arch):
    config = tiny_config(arch)
    plain = meta_model(tiny_record("llava"), config, 16, torch.bfloat16)
    packed = meta_model(tiny_record("llava"), config, 16, torch.bfloat16, "nf4")
    assert count_of(packed) == count_of(plain)
    assert isinstance(get_path(packed.base, packed.anatomy.head_path), nn.Linear)
    layers = [m for m in packed.modules() if isinstance(m, FourBitLinear)]
    assert len(layers) == (4 * 7 if arch == "llama" else 4 * 4)
    moved = sum(m.in_features * m.out_features for m in layers)
    weights, before = weights_of(packed), weights_of(plain)
    assert weights["bfloat16"] == before["bfloat16"] - 2 * moved
    assert weights["nf4"] == sum(m.nbytes for m in layers)


def test_a_4bit_layer_by_hand():
    layer = FourBitLinear(256, 128, None, torch.bfloat16)
    # 32768 numbers: two a byte, one constant for 64, an fp32 one for 256 of these, and the tables.
    assert layer.nbytes == 16384 + 512 + 2 * 4 + (64 + 1024 + 4)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
def test_a_4bit_layer_takes_what_that_of_bitsandbytes_takes():
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(128, 256), quant_type="nf4", compress_statistics=True)
    tensors = [packed, state.absmax, state.code, state.offset]
    tensors += [state.state2.absmax, state.state2.code]
    real = sum(one.numel() * one.element_size() for one in tensors)
    assert FourBitLinear(256, 128, None, torch.bfloat16).nbytes == real
