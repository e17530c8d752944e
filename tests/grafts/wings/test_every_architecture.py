"""Wings on every architecture: the slow reference, the fused router, and where learners stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grafting import (
    CONFIGS,
    MIXTURES,
    batch,
    distance,
    every_architecture,
    graft_on,
    grafted,
    logits_of,
    own,
    perturb,
    project,
    rows,
    text_labels,
)
from mmgraft import GraftedModel, WingsConfig
from mmgraft.anatomy import decoder_layers
from mmgraft.errors import UsageError
from reference.wings_paper import LearnerWeights, wings_layer_reference
from tiny import LAYERS

WORDS = ("ttiiiittiiiittt", "tttttttiiiit", "iiiittttt")
WINGS = CONFIGS["wings"]


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def plain_forward(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Return what the module's class computes, without anything that was put in its way."""
    return type(module).forward(module, *args, **kwargs)


def attention_weights(attention: nn.Module, args: Any, kwargs: Any, out: Any) -> Tensor:
    """The explicit weights ``(b, n, s, s)`` of an eager attention; Falcon gives them if asked."""
    if isinstance(out, tuple) and isinstance(out[1], Tensor):
        return out[1]
    return plain_forward(attention, args, {**kwargs, "output_attentions": True})[1]


def what_wings_adds(
    model: GraftedModel, inputs: dict[str, Tensor], index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """State that enters a layer, what joins its attention branch, the base's own weights."""
    anatomy, seen = model.anatomy, {}
    layer = decoder_layers(model.base, anatomy)[index]
    attention = layer.get_submodule(anatomy.attention_name)
    joint = layer.get_submodule(anatomy.branch_norm) if anatomy.branch_norm else attention

    def at_layer(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        seen["entered"] = args[0] if args else kwargs["hidden_states"]

    def at_attention(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        original = plain_forward(module, args, kwargs)
        seen["weights"] = attention_weights(module, args, kwargs, original)

    def at_joint(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        pair = [
            x[0] if isinstance(x, tuple) else x for x in (out, plain_forward(module, args, kwargs))
        ]
        seen["added"] = (pair[0] - pair[1]) * anatomy.residual_scale

    with (
        torch.no_grad(),
        hooked(layer, at_layer),
        hooked(attention, at_attention),
        hooked(joint, at_joint),
    ):
        model(**inputs, use_cache=False)
    return seen["entered"], seen["added"], seen["weights"]


def initial_features(model: GraftedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Text embeddings with the projected images in place, by hand."""
    features = model.base.get_input_embeddings()(inputs["input_ids"]).clone()
    projected = project(model, inputs["image_features"])
    features[inputs["mm_token_type_ids"] == 1] = projected.flatten(0, 1)
    return features


def learner_weights(wing: nn.Module, name: str) -> LearnerWeights:
    matrices = {
        f"{part}_{way}": getattr(getattr(wing.get_submodule(name), part), way).weight
        for part in ("query", "key", "value", "output")
        for way in ("down", "up")
    }
    return LearnerWeights(**matrices)


@every_architecture
@torch.no_grad()
def test_a_layer_adds_what_the_reference_says(arch: str) -> None:
    """Two layers (a sliding and a full one where there are both), padded on the left."""
    model = perturb(graft_on(arch, WINGS, attention="eager"))
    made = rows(*WORDS)
    inputs = batch(made, "left")
    features = initial_features(model, inputs)
    for index in (0, 1):
        entered, added, weights = what_wings_adds(model, inputs, index)
        wing = model.workflow().graft.layers[str(index)]
        for at, row in enumerate(made):
            real = inputs["attention_mask"][at].bool()
            expected = wings_layer_reference(
                entered[at][real],
                features[at][real],
                row.kinds,
                torch.arange(len(row)),
                weights[at][:, real][:, :, real],
                learner_weights(wing, "visual"),
                learner_weights(wing, "textual"),
                wing.router.weight,
                model.anatomy.num_heads,
                model.anatomy.rope_theta,
            )
            assert expected.abs().max() > 1e-2
            torch.testing.assert_close(added[at][real], expected, atol=1e-5, rtol=1e-4)


@every_architecture
def test_the_fused_router_equals_the_explicit_one(arch: str) -> None:
    """All layers routed; what the base runs by default against eager attention."""
    inputs = batch(rows(*WORDS), "left")
    fused = own(logits_of(grafted(arch, "wings"), inputs), inputs)
    explicit_model = perturb(graft_on(arch, WINGS, attention="eager"))
    explicit = own(logits_of(explicit_model, inputs), inputs)
    for one, other in zip(fused, explicit, strict=True):
        assert distance(one, other) < 2e-5
    with torch.no_grad():
        for wing in explicit_model.workflow().graft.layers.values():
            wing.router.weight.zero_()
    unrouted = own(logits_of(explicit_model, inputs), inputs)
    assert distance(fused[0], unrouted[0]) > 1e-3, "the router does not matter here"


@every_architecture
def test_a_visual_learner_alone_does_nothing_before_the_first_image(arch: str) -> None:
    """Exactly zero, not nearly: such a query sees no key. (Experts round by their whole batch.)"""
    model = perturb(graft_on(arch, WingsConfig(rank=4, learners=["visual"])))
    inputs = batch(rows("tttttiiiittt", "ttttttttiiii"), "left")
    found = logits_of(model, inputs)
    graft = model.workflow().graft
    graft.set_state({"active": False})
    silent = logits_of(model, inputs)
    for at, first in enumerate((5, 8)):
        allowed = 1e-5 if arch in MIXTURES else 0.0
        assert distance(found[at, :first], silent[at, :first]) <= allowed
        assert distance(found[at, first:], silent[at, first:]) > 1e-3


@every_architecture
def test_gradients_are_finite_where_a_query_sees_no_key(arch: str) -> None:
    model = perturb(graft_on(arch, WINGS))
    model.set_trainable(["projector", "graft"])
    model.train()
    inputs = batch(rows("tttttiiiittt", "ttttttttttt", "iiiittt"), "left")
    labels = text_labels(inputs)
    model(**inputs, labels=labels, workflow="mm").loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name


def test_learners_on_some_layers_equal_silent_ones_on_the_rest() -> None:
    some = perturb(graft_on("llama", WingsConfig(rank=4, layers=[1, 3])))
    inputs = batch(rows(*WORDS), "left")
    full = graft_on("llama", WINGS)
    full.workflow().projector.load_state_dict(some.workflow().projector.state_dict())
    with torch.no_grad():
        for index, wing in some.workflow().graft.layers.items():
            full.workflow().graft.layers[index].load_state_dict(wing.state_dict())
    assert sorted(some.workflow().graft.layers) == ["1", "3"]
    assert len(full.workflow().graft.layers) == LAYERS
    assert distance(logits_of(some, inputs), logits_of(full, inputs)) < 1e-5


@torch.no_grad()
def test_a_new_router_gives_both_learners_half() -> None:
    model = perturb(graft_on("llama", WingsConfig(rank=4, layers=[1])))
    wing = model.workflow().graft.layers["1"]
    fresh = graft_on("llama", WingsConfig(rank=4, layers=[1])).workflow().graft.layers["1"]
    assert not fresh.router.weight.any()
    assert fresh.router.weight.shape == (2, model.anatomy.max_positions)
    wing.router.weight.zero_()
    inputs = batch(rows(*WORDS))
    _, added, _ = what_wings_adds(_eager(model), inputs, 1)
    alone = []
    for name in ("visual", "textual"):
        model.workflow().graft.set_state({"learners": [name]})
        alone.append(what_wings_adds(model, inputs, 1)[1])
    torch.testing.assert_close(added, (alone[0] + alone[1]) / 2, atol=1e-6, rtol=1e-5)


def _eager(model: GraftedModel) -> GraftedModel:
    model.base.set_attn_implementation("eager")
    return model


def test_stage_one_runs_the_visual_learner_alone_and_stage_two_both() -> None:
    model = perturb(graft_on("llama", WINGS))
    inputs = batch(rows(*WORDS), "left")
    graft = model.workflow().graft
    both = logits_of(model, inputs)
    graft.set_state({"learners": ["visual"]})
    assert graft.state() == {"active": True, "learners": ["visual"]}
    first = logits_of(model, inputs)
    visual = perturb(graft_on("llama", WingsConfig(rank=4, learners=["visual"])))
    assert not hasattr(visual.workflow().graft.layers["0"], "router")
    visual.workflow().projector.load_state_dict(model.workflow().projector.state_dict())
    with torch.no_grad():
        for index, wing in visual.workflow().graft.layers.items():
            wing.visual.load_state_dict(graft.layers[index].visual.state_dict())
    assert torch.equal(first, logits_of(visual, inputs))
    graft.set_state({"learners": ["textual", "visual"]})
    assert torch.equal(logits_of(model, inputs), both)
    assert distance(first, both) > 1e-2
    with pytest.raises(UsageError, match="has no state stage"):
        graft.set_state({"stage": 1})


def test_a_row_is_refused_when_it_is_longer_than_the_router_and_padding_does_not_count() -> None:
    model = perturb(graft_on("llama", WingsConfig(rank=4, max_length=12)))
    fits = batch(rows("tttttttiiiit"), "left", length=20)
    logits_of(model, fits)
    with pytest.raises(UsageError, match=r"13 positions.*knows 12"):
        logits_of(model, batch(rows("ttttttttiiiit")))
    logits_of(model, batch(rows("t" * 13)))  # the base alone has no router


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_the_router_reads_columns_of_the_tokens_own_positions(arch: str) -> None:
    """A column beyond the row's own length never matters, whatever column the tensor has."""
    model = perturb(graft_on(arch, WINGS))
    made = rows("tttttttiiiit")
    before = {pad: logits_of(model, batch(made, "left", length=12 + pad)) for pad in (0, 6)}
    with torch.no_grad():
        for wing in model.workflow().graft.layers.values():
            wing.router.weight[:, 12:] += 50.0
    after = {pad: logits_of(model, batch(made, "left", length=12 + pad)) for pad in (0, 6)}
    for pad in (0, 6):
        assert torch.equal(before[pad][:, pad:], after[pad][:, pad:])
    with torch.no_grad():
        for wing in model.workflow().graft.layers.values():
            wing.router.weight[0, 11] += 50.0
    moved = logits_of(model, batch(made, "left", length=18))[:, 6:] - after[6][:, 6:]
    assert moved[:, :11].abs().max() == 0.0
    assert moved[:, 11].abs().max() > 1e-3


def test_what_wings_cannot_stand_on_is_refused() -> None:
    with pytest.raises(UsageError, match="Methods that can: iaa, llava"):
        graft_on("opt_post_norm", WINGS)
    with pytest.raises(
        UsageError, match=r"5 learner heads do not fit hidden size 32.*1, 2, 4, 8, 16"
    ):
        graft_on("llama", WingsConfig(rank=4, heads=5))
    with pytest.raises(UsageError, match="even size"):
        graft_on("llama", WingsConfig(rank=4, heads=32))
    graft_on("gpt2", WingsConfig(rank=4, heads=32))  # without rotary positions an odd size is fine


@pytest.mark.parametrize("heads", [1, 2, 16])
def test_the_number_of_heads_is_a_setting(heads: int) -> None:
    models = [perturb(graft_on("llama", WingsConfig(rank=4, heads=n))) for n in (heads, 4)]
    inputs = batch(rows(*WORDS))
    assert distance(*(logits_of(model, inputs) for model in models)) > 1e-3
