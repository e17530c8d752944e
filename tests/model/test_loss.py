"""The loss: supervised positions only, in chunks, with the base's own way of making logits."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grafting import (
    CONFIGS,
    batch,
    cross_entropy,
    every_architecture,
    every_pair,
    graft_on,
    grafted,
    logits_of,
    perturb,
    plain,
    rows,
    text_labels,
    together,
    trained_groups,
)
from mmgraft.model import loss as loss_module
from mmgraft.model.loss import chunked_loss, supervised

WORDS = ("ttiiiitttttt", "iiiittiiiittt", "ttttttttt")


class LargestLive(TorchDispatchMode):
    """Counts the numbers in tensors that are alive, of those made inside, at their most."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.now, self.most = dtype, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.dtype == self.dtype:
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes() // self.dtype.itemsize
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_a_position_predicts_the_next_token() -> None:
    labels = torch.tensor([[7, -100, 8, 9], [-100, -100, -100, 5]])
    mask = supervised(labels)
    assert mask.tolist() == [[False, True, True, False], [False, False, True, False]]


@pytest.mark.parametrize("chunk", [1, 3, 5, 12, 100])
def test_chunks_change_neither_loss_nor_gradients(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 8, generator=generator, requires_grad=True)
    head = torch.nn.Linear(8, 10)
    targets = torch.randint(0, 10, (12,), generator=generator)
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    wanted = torch.autograd.grad(expected, [hidden, *head.parameters()])
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk * 10)
    seen: list[int] = []

    def watched(piece: Tensor) -> Tensor:
        seen.append(len(piece))
        return head(piece)

    found = chunked_loss(hidden, targets, watched, 10)
    assert max(seen) <= chunk
    assert sum(seen) == 12
    assert len(seen) == math.ceil(12 / chunk)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, [hidden, *head.parameters()]), wanted, strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    assert len(seen) == 2 * math.ceil(12 / chunk) - 1  # all but the last one are made again
    with torch.no_grad():
        torch.testing.assert_close(chunked_loss(hidden, targets, head, 10), expected)


def test_half_precision_is_summed_in_fp32() -> None:
    hidden, head = torch.randn(64, 8).bfloat16(), torch.nn.Linear(8, 10).bfloat16()
    targets = torch.randint(0, 10, (64,))
    found = chunked_loss(hidden, targets, head, 10)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(head(hidden).float(), targets) * 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 25, 1000])
def test_the_lean_cross_entropy_is_torchs(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "BLOCK_LOGITS", block)
    generator = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(7, 10, generator=generator)).to(dtype)
    logits[2, 3] = -torch.inf  # a base may rule an id out
    logits.requires_grad_(True)
    targets = torch.tensor([0, 9, 4, 4, 1, 2, 3])
    weight = torch.tensor(0.37)
    expected = F.cross_entropy(logits.float(), targets, reduction="sum")
    found = loss_module._CrossEntropy.apply(logits, targets)
    assert found is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (wanted,) = torch.autograd.grad(weight * expected, logits)
    kept = logits.detach().clone()
    (mine,) = torch.autograd.grad(weight * found, logits)
    torch.testing.assert_close(mine, wanted)
    assert torch.equal(logits, kept)  # what a head keeps of them stays as it was


def test_the_loss_holds_two_tensors_of_a_chunk_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Count tensors of the size of a chunk's logits: they and their gradient, whatever the rows."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 50_000)
    monkeypatch.setattr(loss_module, "BLOCK_LOGITS", 1_000)
    hidden = torch.randn(400, 4, requires_grad=True)
    head = torch.nn.Linear(4, 1_000, bias=False).requires_grad_(False)
    targets = torch.randint(0, 1_000, (400,))
    with LargestLive(torch.float32) as live:
        chunked_loss(hidden, targets, head, 1_000).backward()
    assert live.most < 2.5 * 50_000


def test_no_supervised_position_is_a_zero_with_zero_gradients() -> None:
    hidden, head = torch.zeros(0, 8, requires_grad=True), torch.nn.Linear(8, 10)
    assert chunked_loss(hidden, torch.zeros(0, dtype=torch.long), head, 10).item() == 0.0


@every_pair
def test_the_loss_is_that_of_the_logits(arch: str, method: str) -> None:
    """Own heads, scales and soft-caps included; text rows count outside training."""
    model, inputs = grafted(arch, method), batch(rows(*WORDS), "left")
    labels = text_labels(inputs)
    with torch.no_grad():
        found = model(**inputs, labels=labels)
    assert found.logits is None
    expected = cross_entropy(logits_of(model, inputs), labels)
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-5)


@every_architecture
def test_the_loss_of_text_is_the_bases(arch: str) -> None:
    model, base, inputs = grafted(arch, "iaa-c"), plain(arch), batch(rows("tttttttt", "tttttttt"))
    labels = text_labels(inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs, labels=labels).loss, base(**inputs, labels=labels).loss)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen2"])
def test_every_row_has_the_head_of_its_workflow(arch: str) -> None:
    made = [
        perturb(graft_on(arch, CONFIGS[method], workflow=name), seed=seed)
        for seed, (name, method) in enumerate([("mm", "iaa-c"), ("grounding", "iaa-a")])
    ]
    model, inputs = together(*made), batch(rows(*WORDS))
    labels, names = text_labels(inputs), ["mm", "grounding", "text"]
    with torch.no_grad():
        found = model(**inputs, labels=labels, workflow=names).loss
    expected = cross_entropy(logits_of(model, inputs, workflow=names), labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", CONFIGS)
def test_training_counts_the_rows_that_train_something(method: str) -> None:
    model = perturb(graft_on("llama", CONFIGS[method]))
    model.set_trainable(trained_groups(method))
    model.train()
    inputs = batch(rows(*WORDS), "left")
    labels = text_labels(inputs)
    without = labels.clone()
    without[2] = -100
    logits = logits_of(model, inputs)
    found = model(**inputs, labels=labels).loss
    torch.testing.assert_close(found, cross_entropy(logits, without), rtol=1e-5, atol=1e-5)
    counted = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    total = cross_entropy(logits, without) * supervised(without).sum() / 100
    torch.testing.assert_close(counted, total, rtol=1e-5, atol=1e-5)
    # A text row that was asked to run the graft trains it.
    asked = model(**inputs, labels=labels, workflow="mm").loss
    everywhere = cross_entropy(logits_of(model, inputs, workflow="mm"), labels)
    torch.testing.assert_close(asked, everywhere, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_step_of_text_alone_is_zero_and_reaches_every_trained_parameter(method: str) -> None:
    model = graft_on("llama", CONFIGS[method])
    names = model.set_trainable(trained_groups(method))
    model.train()
    inputs = batch(rows("tttttttt", "ttttt"))
    loss = model(**inputs, labels=text_labels(inputs)).loss
    assert loss.item() == 0.0
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(gradients) == set(names)
    assert all(g is not None and not g.any() for g in gradients.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_text_trains_a_base_that_is_trained(checkpointing: bool) -> None:
    model = graft_on("llama", CONFIGS["llava"])
    model.set_trainable(["base", "projector"])
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    inputs = batch(rows("tttttttt", "ttttt"))
    labels = text_labels(inputs)
    loss = model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, cross_entropy(logits_of(plain("llama"), inputs), labels))
    loss.backward()
    assert model.base.model.layers[0].mlp.up_proj.weight.grad.any()
    mixed = batch(rows(*WORDS))
    expected = cross_entropy(logits_of(model, mixed), text_labels(mixed))
    torch.testing.assert_close(model(**mixed, labels=text_labels(mixed)).loss, expected)


def test_labels_without_a_supervised_token_give_zero() -> None:
    model, inputs = grafted("llama", "iaa-c"), batch(rows("ttiiiitt"))
    nothing = torch.full_like(inputs["input_ids"], -100)
    with torch.no_grad():
        assert model(**inputs, labels=nothing).loss.item() == 0.0
