"""The router through an attention's own kernel against the weights written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmgraft.errors import UsageError
from mmgraft.grafts.computing import as_if_on
from mmgraft.grafts.wings import router as router_module
from mmgraft.grafts.wings.router import IMPLEMENTATION, Router, explicit_weights, route
from tiny import tiny_model


def columns_of(router: Router, positions: Tensor) -> Any:
    return lambda count: router.columns(positions[:, :count].clamp(min=0))


def attention_call(arch: str, implementation: str, length: int = 9) -> tuple[Any, dict[str, Any]]:
    """A real attention module and the keyword arguments that its layer calls it with."""
    model = tiny_model(arch)
    model.set_attn_implementation(implementation)
    attention = model.model.layers[1].self_attn
    caught: dict[str, Any] = {}

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        caught.update(kwargs)

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    ids = torch.randint(6, 300, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
    handle.remove()
    return attention, caught


def random_router(length: int = 64) -> Router:
    router = Router(length)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
    return router


# Equal heads and grouped ones, heads of 8 and of 12, a sliding window.
@pytest.mark.parametrize("arch", ["phi3", "llama", "qwen3", "mistral", "mistral_sliding", "olmo2"])
@torch.no_grad()
def test_fused_and_explicit_routing_agree(arch: str) -> None:
    positions = torch.arange(9).expand(2, -1).clone()
    positions[1] = (positions[1] - 3).clamp(min=0)
    router = random_router()
    found = {}
    for implementation, fused in [("sdpa", True), ("eager", False)]:
        attention, kwargs = attention_call(arch, implementation)
        original = attention.forward
        expected = original(**kwargs)[0]
        out, logits = route(original, attention, columns_of(router, positions), fused, (), kwargs)
        torch.testing.assert_close(out[0], expected, atol=1e-6, rtol=1e-5)
        found[implementation, fused] = logits
        assert logits.shape == (2, 9, 2)
        assert logits.dtype == torch.float32
        assert attention.config._attn_implementation == implementation
    weights = attention_call(arch, "eager")[0].forward(**kwargs)[1]
    written_out = torch.stack(
        [weights[b].sum(0) @ router.weight[:, positions[b]].T for b in (0, 1)]
    )
    real = positions.new_ones(2, 9).bool()
    real[1, :3] = False  # a padded query has no meaning, and each kernel gives it another one
    for key, logits in found.items():
        torch.testing.assert_close(logits[real], written_out[real], atol=1e-5, rtol=1e-5, msg=key)
    assert written_out[real].abs().max() > 0.1


def test_heads_too_wide_for_a_card_take_two_calls_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose by the path alone, as an estimate of memory does, and without gradients
    everywhere, so that what the base's attention gives is its own to the bit.
    """
    monkeypatch.setattr(router_module, "_WIDEST_FUSED", 8)
    positions, router = torch.arange(9).expand(2, -1), random_router()
    attention, kwargs = attention_call("llama", "sdpa")
    inner, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or inner(*a, **k)
    )
    given = (attention.forward, attention, columns_of(router, positions), True, (), kwargs)
    once = route(*given)
    assert len(calls) == 1
    with as_if_on("cuda"):
        twice = route(*given)
    assert len(calls) == 3
    torch.testing.assert_close(twice[1], once[1])
    torch.testing.assert_close(twice[0][0], once[0][0])
    with torch.no_grad():
        still = route(*given)
    assert len(calls) == 5
    assert torch.equal(still[0][0], attention.forward(**kwargs)[0])


@torch.no_grad()
def test_two_routers_in_one_attention_do_not_meet() -> None:
    """Two Wings workflows in one batch: one attention runs inside the other's routing."""
    attention, kwargs = attention_call("llama", "sdpa")
    positions = torch.arange(9).expand(2, -1)
    routers = [random_router(), Router(64)]
    torch.nn.init.normal_(routers[1].weight, generator=torch.Generator().manual_seed(2))
    original = attention.forward
    alone = [
        route(original, attention, columns_of(r, positions), True, (), kwargs) for r in routers
    ]
    caught = []

    def inner(**given: Any) -> Any:
        out, logits = route(original, attention, columns_of(routers[1], positions), True, (), given)
        caught.append(logits)
        return out

    out, logits = route(inner, attention, columns_of(routers[0], positions), True, (), kwargs)
    torch.testing.assert_close(out[0], alone[0][0][0])
    torch.testing.assert_close(logits, alone[0][1])
    torch.testing.assert_close(caught[0], alone[1][1])


def test_an_exception_puts_the_attention_back() -> None:
    attention, _ = attention_call("llama", "sdpa")

    def broken(*_: Any, **__: Any) -> None:
        assert attention.config._attn_implementation == IMPLEMENTATION
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        route(broken, attention, lambda count: torch.zeros(2, count, 2), True, (), {})
    assert attention.config._attn_implementation == "sdpa"
    assert not [
        key for key in attention.__dict__ if key.startswith("_mmgraft") and attention.__dict__[key]
    ]


def test_an_attention_without_weights_is_told() -> None:
    attention, _ = attention_call("llama", "sdpa")
    with pytest.raises(UsageError, match="no attention weights"):
        route(
            lambda: (torch.zeros(1), None), attention, lambda n: torch.zeros(1, n, 2), False, (), {}
        )


@pytest.mark.parametrize("form", ["causal", "boolean", "additive", "none"])
def test_weights_of_a_fused_kernel_written_out(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3))
    seen = torch.rand(2, 1, 5, 5, generator=generator) > 0.3
    seen |= torch.eye(5, dtype=torch.bool)
    options: dict[str, Any] = {
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": seen},
        "additive": {"attn_mask": torch.zeros(2, 1, 5, 5).masked_fill(~seen, -1e4), "scale": 0.3},
        "none": {},
    }[form]
    weights = explicit_weights(query, key, **options)
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(weights @ value, expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))


@pytest.mark.parametrize("form", ["none", "padding", "bool", "by head", "added", "added by head"])
def test_a_single_query_sees_what_its_mask_shows(form: str) -> None:
    """Compare grouped heads with the softmax written out; keys behind the mask are the largest."""
    generator = torch.Generator().manual_seed(0)
    query, key, columns = (
        torch.randn(size, generator=generator) for size in ((2, 6, 1, 8), (2, 3, 7, 8), (2, 7, 2))
    )
    seen = torch.ones(2, 6, 1, 7, dtype=torch.bool)
    seen[1, :, :, :3] = False
    if "head" in form:
        seen[0, ::2, :, 5:] = False
    key[~seen[:, ::2].transpose(2, 3).expand_as(key)] *= 9
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = {
        "none": None, "padding": seen[:, 0, 0], "bool": seen[:, :1], "by head": seen,
        "added": added[:, :1], "added by head": added,
    }[form]  # fmt: skip
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.3  # (b, n, 1, S)
    if form != "none":
        scores = scores.masked_fill(~seen, float("-inf"))
    wanted = scores.softmax(-1).sum(1) @ columns
    found = router_module._one_query(query, key, mask, columns, 0.3)
    torch.testing.assert_close(found, wanted)


def test_columns_are_those_of_the_positions() -> None:
    router = random_router(7)
    found = router.columns(torch.tensor([[0, 6, 0], [3, 3, 2]]))
    assert torch.equal(found[0, 1], router.weight[:, 6])
    assert torch.equal(found[0, 2], router.weight[:, 0])  # padding: masked by the attention
    assert torch.equal(found[1, 0], found[1, 1])
    found.sum().backward()
    assert router.weight.grad.any()


def test_the_registry_knows_the_router() -> None:
    assert IMPLEMENTATION in ALL_ATTENTION_FUNCTIONS
