"""A learner's attention in pieces: what a mask gives, for any order of text, images and padding."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from grafting import batch, graft_on, perturb, rows
from mmgraft import WingsConfig
from mmgraft.grafts.base import IMAGE, TEXT, Pass
from mmgraft.grafts.wings import pieces
from mmgraft.grafts.wings.pieces import attend_pieces, plan_pieces

KINDS = {".": 0, "t": TEXT, "i": IMAGE}


def a_pass(words: list[str], segments: list[list[int]] | None = None) -> Pass:
    kinds = torch.tensor([[KINDS[letter] for letter in word] for word in words])
    features = torch.randn(*kinds.shape, 4, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(kinds.shape[1]).expand_as(kinds)
    given = None if segments is None else torch.tensor(segments)
    return Pass(None, features, kinds, positions, kinds, positions, 0, segments=given)  # type: ignore[arg-type]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[str], list[list[int]] | None]:
    length, count = draw(st.integers(1, 10)), draw(st.integers(1, 3))
    words = [draw(st.text("ti.", min_size=length, max_size=length)) for _ in range(count)]
    if draw(st.booleans()):
        return words, None
    return words, [sorted(draw(st.integers(1, 3)) for _ in range(length)) for _ in words]


@settings(max_examples=80, deadline=None)
@given(batches(), st.sampled_from([TEXT, IMAGE]))
def test_pieces_give_what_the_mask_gives(
    drawn: tuple[list[str], list[list[int]] | None], kind: int
) -> None:
    state = a_pass(*drawn)
    state.pack(kind)
    if kind not in state.packed:
        return
    packed, shortest = state.packed[kind], pieces._SHORTEST
    pieces._SHORTEST = 0  # type: ignore[misc]
    try:
        plan = plan_pieces(state, kind)
    finally:
        pieces._SHORTEST = shortest  # type: ignore[misc]
    assert plan is not None
    draw = torch.Generator().manual_seed(0)
    (b, s), width = state.kinds.shape, packed.columns.shape[1]

    def random(length: int) -> Tensor:
        return torch.randn(b, 2, length, 4, generator=draw, requires_grad=True)

    inputs = query, key, value = random(s), random(width), random(width)

    def lower(mixed: Tensor) -> Tensor:
        return mixed.transpose(1, 2).flatten(2)[..., :3]

    ours = attend_pieces(plan, query, key, value, lower, 3)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=packed.mask)
    theirs = torch.where(packed.seen, lower(mixed), 0.0)
    real = (state.kinds != 0)[..., None]
    torch.testing.assert_close(ours * real, theirs * real)
    assert not ours[~packed.seen.squeeze(-1)].any()
    weight = torch.randn(ours.shape, generator=draw) * real
    found = torch.autograd.grad(ours, inputs, weight, allow_unused=True, retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(theirs, inputs, weight), strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other)


def test_the_pieces_of_a_row() -> None:
    state = a_pass(["." + "t" * 20 + "i" * 20 + "t" * 39])
    state.pack(IMAGE)
    (row,) = plan_pieces(state, IMAGE) or []
    assert [vars(segment) for segment in row] == [
        {"first": 0, "count": 20, "own": [(21, 41)], "others": [(41, 80, 20)]}
    ]
    (row,) = plan_pieces(state, TEXT) or []
    assert [vars(segment) for segment in row] == [
        {"first": 0, "count": 59, "own": [(1, 21), (41, 80)], "others": [(21, 41, 20)]}
    ]
    assert plan_pieces(a_pass(["ti" * 40]), TEXT) is None


def test_a_model_gives_the_same_with_and_without(monkeypatch: object) -> None:
    """Long runs, so that pieces are taken; a mask where they are refused."""
    words = ("t" * 20 + "i" * 16 + "t" * 30, "i" * 32 + "t" * 20)
    model = perturb(graft_on("llama", WingsConfig(rank=4)))
    inputs = batch(rows(*words), "left")
    model.set_trainable(["graft"])
    results = []
    for shortest in (16, 1000):
        monkeypatch.setattr(pieces, "_SHORTEST", shortest)  # type: ignore[attr-defined]
        model.zero_grad()
        logits = model(**inputs, workflow="mm", use_cache=False).logits
        kept = logits[inputs["attention_mask"].bool()]
        kept.log_softmax(-1)[:, 5].sum().backward()
        grads = [p.grad.clone() for p in model.workflow().graft.parameters() if p.grad is not None]
        results.append([kept.detach(), *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
