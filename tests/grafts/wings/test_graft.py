"""Wings' paper form inside a base, against the slow reference, and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from grafting import batch, graft_on, perturb, project, rows
from mmgraft import GraftedModel, WingsConfig
from mmgraft.errors import UsageError
from mmgraft.grafts.wings.learners import Rotation
from mmgraft.grafts.wings.router import explicit_weights
from mmgraft.published.wings.config import OfficialWingsConfig
from reference.wings_paper import LearnerWeights, wings_layer_reference

LAYER = 1
WORDS = ("ttiiiittiiiittt", "tttttttiiiit", "iiiittttt")


def at_layer(model: GraftedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
    """State entering the layer ``(b, s, h)``, its attention's output, and its weights if given."""
    seen: dict[str, Any] = {}
    layer = model.base.model.layers[LAYER]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.update(entered=args[0])),
        layer.self_attn.register_forward_hook(lambda _, __, out: seen.update(out=out)),
    ]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen["entered"], seen["out"][0], seen["out"][1]


def weights_of(model: GraftedModel, name: str) -> LearnerWeights:
    learner = model.workflow().graft.layers[str(LAYER)].get_submodule(name)
    parts = ("query", "key", "value", "output")
    return LearnerWeights(
        *(getattr(getattr(learner, part), way).weight for part in parts for way in ("down", "up"))
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("learners", [["visual", "textual"], ["visual"]])
def test_a_layer_adds_what_the_reference_says(
    attention: str, side: str, learners: list[str]
) -> None:
    """Fused (sdpa) and explicit (eager) router; padding on either side; two images in a row."""
    config = WingsConfig(layers=[LAYER], rank=4, heads=2, learners=learners)
    model = perturb(graft_on("llama", config, attention=attention))
    made = rows(*WORDS)
    inputs = batch(made, side)
    entered, out, _ = at_layer(model, inputs)
    graft = model.workflow().graft
    graft.set_state({**graft.state(), "active": False})
    model.base.set_attn_implementation("eager")
    _, plain, weights = at_layer(model, inputs)
    embeds = model.base.get_input_embeddings()(inputs["input_ids"])
    images = project(model, inputs["image_features"]).flatten(0, 1)
    features = embeds.masked_scatter(inputs["mm_token_type_ids"].bool()[..., None], images)
    router = graft.layers[str(LAYER)].router.weight if len(learners) == 2 else None
    textual = weights_of(model, "textual") if len(learners) == 2 else None
    for at, row in enumerate(made):
        real = inputs["attention_mask"][at].bool()
        with torch.no_grad():
            expected = wings_layer_reference(
                entered[at][real],
                features[at][real],
                row.kinds,
                torch.arange(len(row)),
                weights[at][:, real][:, :, real],
                weights_of(model, "visual"),
                textual,
                router,
                2,
                model.anatomy.rope_theta,
            )
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close((out - plain)[at][real], expected, atol=2e-6, rtol=1e-4)


def test_rotation_rounds_once() -> None:
    x = torch.randn(1, 2, 6, 8).bfloat16()
    positions = torch.arange(1000, 1006)[None]
    exact = Rotation(positions, 8, 10_000.0)(x.float())
    assert torch.equal(Rotation(positions, 8, 10_000.0)(x), exact.bfloat16())


def test_explicit_weights_of_grouped_heads() -> None:
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    repeated = key.repeat_interleave(2, dim=1)
    value = torch.randn(1, 4, 5, 8)
    weights = explicit_weights(query, key, is_causal=True, enable_gqa=True)
    out = F.scaled_dot_product_attention(query, repeated, value, is_causal=True)
    torch.testing.assert_close(weights @ value, out)


def test_a_learner_that_the_graft_lacks_is_named() -> None:
    graft = graft_on("llama", WingsConfig(rank=2)).workflow().graft
    with pytest.raises(UsageError, match="cannot run textal"):
        graft.set_state({"learners": ["visual", "textal"]})
    assert graft.state()["learners"] == ["visual", "textual"]


def test_only_a_router_bounds_the_length() -> None:
    bounded = WingsConfig(rank=2, max_length=8)
    with pytest.raises(UsageError, match="9 positions"):
        graft_on("llama", bounded).workflow().graft.check_length(9)
    alone = bounded.model_copy(update={"learners": ["visual"]})
    graft_on("llama", alone).workflow().graft.check_length(9)


@pytest.mark.parametrize("arch", ["phi", "granite", "gemma2", "gpt2"])
def test_the_published_code_is_for_plain_rotary_blocks(arch: str) -> None:
    config = OfficialWingsConfig(system_prompt_length=2, image_token_length=4)
    with pytest.raises(UsageError, match=r"knows Llama and Qwen2 only.*Methods that can: .*llava"):
        graft_on(arch, config)
