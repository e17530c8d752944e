"""The make-believe card does what CUDA does with devices, and says where the host would wait."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import is_torch_cuda_available

from pretend_cuda import Card, OnCard, kernel_of, pretend_cuda


def test_tensors_lie_on_it(card: Card) -> None:
    for made in (
        torch.ones(2, device="cuda"),
        torch.tensor([1.0, 2.0], device="cuda"),
        torch.arange(2).to("cuda"),
        torch.ones(2).cuda(),
        nn.Linear(2, 2).to("cuda").weight,
        nn.Linear(2, 2, device="cuda").weight,
        torch.ones(2, device="cuda").new_zeros(3),
    ):
        assert isinstance(made, OnCard)
        assert made.is_cuda
        assert made.device == torch.device("cuda:0")
    assert torch.ones(2, device="cuda").cpu().tolist() == [1, 1]


REFUSED = {
    "add": lambda c, h: c + h,
    "cat": lambda c, h: torch.cat([c, h]),
    "mm": lambda c, h: c @ h,
    "in place on the CPU": lambda c, h: h.add_(c),
    "mask on the CPU": lambda c, h: c.masked_fill(h > 0, 0.0),
    "index of a card for the CPU": lambda c, h: h[c.long()],
    "embedding": lambda c, h: F.embedding(h.long(), c),
}


@pytest.mark.parametrize("name", REFUSED)
def test_two_devices_are_refused(card: Card, name: str) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        REFUSED[name](torch.ones(2, 2, device="cuda"), torch.ones(2, 2))


def test_what_cuda_takes_is_taken(card: Card) -> None:
    x = torch.ones(2, 2, device="cuda")
    assert (x + torch.tensor(1.0)).is_cuda
    assert x[torch.tensor([0])].is_cuda
    x[x > 0] = 0
    x.copy_(torch.ones(2, 2))
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device="cuda", generator=torch.Generator())


WAITS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "boolean mask": lambda x: x[x > 0],
    "copy to host": lambda x: x.cpu(),
    "copy to card": lambda x: torch.tensor([1.0], device="cuda"),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x[0].long(), dim=0),
    None: lambda x: (x * 2).masked_fill(x > 0, 0.0).sum(),
}


@pytest.mark.parametrize("kind", WAITS)
def test_waits_are_counted_with_their_place(card: Card, kind: str | None) -> None:
    x = torch.ones(2, 2, device="cuda")
    with card.counting() as seen:
        WAITS[kind](x)
    assert list(seen.waits.values()) == ([] if kind is None else [1])
    for found, where in seen.waits:
        assert found == kind
        assert where.startswith("test_pretend_cuda.py:")


def test_a_pinned_copy_is_not_waited_for(card: Card) -> None:
    torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    assert card.count == 0
    assert sum(card.loose.values()) == 1


def test_training_is_what_it_is_on_the_cpu() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    with pretend_cuda():
        there = copy.deepcopy(plain).to("cuda")
        again = copy.deepcopy(there)
        for model, device in ((plain, "cpu"), (there, "cuda"), (again, "cuda")):
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            for _ in range(3):
                model(x.to(device)).square().sum().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        for model in (there, again):
            for mine, wanted in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(mine.cpu(), wanted)


def test_autocast_is_that_of_cuda(card: Card) -> None:
    norm, x = nn.LayerNorm(4, device="cuda"), torch.ones(2, 4, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (x @ x.t()).dtype == torch.bfloat16
        assert norm(x.bfloat16()).dtype == torch.float32  # on a CPU it stays in bf16


def test_data_and_ties_survive_a_move(card: Card) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    before = model["a"].weight
    model.to("cuda")
    assert model["a"].weight is model["b"].weight is before
    before.data = before.data.bfloat16()
    assert before.dtype == before.detach().cpu().dtype == torch.bfloat16


def test_two_cards_are_two_devices() -> None:
    with pretend_cuda(2):
        one, two = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
        with pytest.raises(RuntimeError, match="cuda:0 and cuda:1"):
            one + two
        assert (one.to("cuda:1") + two).device == torch.device("cuda:1")


def test_kernels_of_attention(card: Card) -> None:
    q = torch.ones(1, 2, 3, 8, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(3, 3, dtype=torch.bool, device="cuda")
    assert kernel_of(q, q, q, is_causal=True) == "flash"
    assert kernel_of(q, q, q, mask) == "efficient (mask)"
    assert kernel_of(q, q[:, :1], q[:, :1], mask, enable_gqa=True) == "math (mask)"


def test_afterwards_there_is_none() -> None:
    assert not is_torch_cuda_available()  # which keeps its answer
    with pretend_cuda():
        assert torch.cuda.is_available()
        assert is_torch_cuda_available()
    assert not torch.cuda.is_available()
    assert not is_torch_cuda_available()
    assert torch.accelerator.current_accelerator() is None
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device="cuda")
