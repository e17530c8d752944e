"""The projector: two layers, exact GELU, published key endings."""

from __future__ import annotations

import math

import pytest
import torch

from mmgraft.vision.plan import Plan
from mmgraft.vision.projectors.built_in import MlpProjector
from mmgraft.vision.projectors.configs import MlpConfig

PLANS = [Plan.of_count(4)] * 2


def by_hand(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if "norm.weight" in state:
        x = (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        x = x * state["norm.weight"] + state["norm.bias"]
    x = x @ state["mlp.0.weight"].T + state["mlp.0.bias"]
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return x @ state["mlp.2.weight"].T + state["mlp.2.bias"]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("hidden", [None, 7])
def test_projection_by_hand(norm: bool, hidden: int | None) -> None:
    projector = MlpProjector(MlpConfig(norm=norm, hidden=hidden), 6, 10)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(8, 6) * 3 + 1
    state = projector.state_dict()
    torch.testing.assert_close(projector(x, PLANS), by_hand(state, x), atol=1e-4, rtol=1e-5)
    assert state["mlp.0.weight"].shape == (hidden or 10, 6)
    linear = ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]
    assert list(state) == (["norm.weight", "norm.bias"] if norm else []) + linear


def test_initial_scale_scales_the_output() -> None:
    x = torch.randn(3, 6)
    torch.manual_seed(0)
    plain = MlpProjector(MlpConfig(norm=True), 6, 10)
    torch.manual_seed(0)
    small = MlpProjector(MlpConfig(norm=True, init_scale=0.2), 6, 10)
    torch.testing.assert_close(small(x, PLANS), 0.2 * plain(x, PLANS))
    assert torch.equal(small.mlp[0].weight, plain.mlp[0].weight)


def test_features_of_another_dtype_are_cast() -> None:
    projector = MlpProjector(MlpConfig(norm=True), 6, 10)
    assert projector(torch.randn(3, 6, dtype=torch.bfloat16), PLANS).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projector(torch.randn(3, 6), PLANS).dtype == torch.bfloat16
