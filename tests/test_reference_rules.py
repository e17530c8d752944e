"""The references without golden data: Wings as in the paper, IAA structures a and b."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from reference.decoder import causal_mask
from reference.iaa import iaa_reference
from reference.wings_paper import LearnerWeights, router_reference, wings_layer_reference

LENGTH, HIDDEN, HEADS, RANK = 9, 12, 2, 3
KINDS = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0, 0])
POSITIONS = torch.arange(LENGTH)


def weights(seed: int) -> LearnerWeights:
    generator = torch.Generator().manual_seed(seed)
    return LearnerWeights(
        **{
            field.name: torch.randn(
                (RANK, HIDDEN) if field.name.endswith("down") else (HIDDEN, RANK),
                generator=generator,
            )
            for field in fields(LearnerWeights)
        }
    )


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, init = torch.randn(2, LENGTH, HIDDEN, generator=generator)
    scores = torch.randn(4, LENGTH, LENGTH, generator=generator)
    attention = scores.masked_fill(~causal_mask(LENGTH), -torch.inf).softmax(-1)
    return x, init, attention, torch.randn(2, 20, generator=generator)


def addition(kinds: Tensor = KINDS, positions: Tensor = POSITIONS, theta=None, **present) -> Tensor:
    x, init, attention, router = inputs()
    learners = {"visual": weights(1), "textual": weights(2), **present}
    return wings_layer_reference(
        x, init, kinds, positions, attention, **learners, router=router, heads=HEADS, theta=theta
    )


def fused_learner(x: Tensor, init: Tensor, keys: Tensor, w: LearnerWeights) -> Tensor:
    """The same learner through torch's own attention, without rotation."""

    def heads(t: Tensor) -> Tensor:
        return t.view(LENGTH, HEADS, -1).transpose(0, 1)

    mixed = functional.scaled_dot_product_attention(
        heads(x + x @ w.query_down.T @ w.query_up.T),
        heads(init + init @ w.key_down.T @ w.key_up.T),
        heads(init + init @ w.value_down.T @ w.value_up.T),
        attn_mask=causal_mask(LENGTH) & keys,
    )
    return mixed.transpose(0, 1).flatten(1) @ w.output_down.T @ w.output_up.T


def test_a_learner_equals_torchs_attention_and_is_zero_without_keys() -> None:
    x, init, _, _ = inputs()
    got = addition(textual=None)
    expected = fused_learner(x, init, KINDS == 1, weights(1))
    assert not got[:2].any()  # no image yet, and no nan
    torch.testing.assert_close(got[2:], expected[2:], rtol=1e-4, atol=1e-4)


def test_two_learners_share_by_the_router() -> None:
    _, _, attention, router = inputs()
    share = (attention.sum(0) @ router[:, :LENGTH].T).softmax(-1)
    alone = share[:, :1] * addition(textual=None) + share[:, 1:] * addition(visual=None)
    torch.testing.assert_close(addition(), alone, rtol=1e-4, atol=1e-4)


def test_rotation_depends_on_distances_alone_and_the_router_on_positions() -> None:
    _, _, attention, router = inputs()
    moved = addition(theta=10000.0, textual=None, positions=POSITIONS + 5)
    torch.testing.assert_close(moved, addition(theta=10000.0, textual=None), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(moved, addition(textual=None), atol=1e-2)
    expected = (attention.sum(0) @ router[:, 5 : 5 + LENGTH].T).softmax(-1)
    torch.testing.assert_close(router_reference(attention, POSITIONS + 5, router), expected)


def test_two_learners_without_a_router_are_refused() -> None:
    x, init, _, _ = inputs()
    with pytest.raises(ValueError, match="router"):
        wings_layer_reference(
            x, init, KINDS, POSITIONS, None, weights(1), weights(2), None, HEADS, None
        )


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        # base x -> x + 1, inserted x -> 10 x after layers 0 and 2, gate x -> x / 2
        ("c", [1.0, 20.0, 21.0, 220.0]),
        ("b", [1.0, 12.0, 13.0, 84.0]),
        # c_0 = 10 · 1, X^1 = 2 + 5, X^2 = 8, c_1 = 10 (10 + 8), X^3 = 9 + 90
        ("a", [1.0, 7.0, 8.0, 99.0]),
    ],
)
def test_iaa_structures_by_hand(structure: str, expected: list[float]) -> None:
    states = iaa_reference(
        base_layers=[lambda x: x + 1] * 3,
        inserted={0: lambda x: 10 * x, 2: lambda x: 10 * x},
        gates={0: lambda x: x / 2, 2: lambda x: x / 2},
        structure=structure,
        x=torch.tensor(1.0),
    )
    assert [float(state) for state in states] == expected
