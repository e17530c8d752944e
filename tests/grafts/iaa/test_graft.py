"""IAA's structures on every architecture against the slow reference, and what a workflow owns."""

from __future__ import annotations

from collections.abc import Callable
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
    perturb,
    plain,
    project,
    rows,
)
from mmgraft import GraftedModel, IAAConfig
from mmgraft.anatomy import decoder_layers, get_path
from mmgraft.errors import UsageError
from reference.iaa import iaa_reference

WORDS = ("ttiiiittiiiittt", "tttttttiiiit")


def layer_calls(model: GraftedModel, embeds: Tensor, mask: Tensor) -> list[tuple[Tensor, Any, Any]]:
    """State, further arguments and keywords of each layer when the base runs these embeddings."""
    calls: list[Any] = []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        calls.append((args[0] if args else kwargs["hidden_states"], args[1:], rest))

    layers = decoder_layers(model.base, model.anatomy)
    handles = [each.register_forward_pre_hook(keep, with_kwargs=True) for each in layers]
    given = {"inputs_embeds": embeds, "attention_mask": mask}
    if model._takes_positions:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model.base(**given, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def calling(module: nn.Module, call: tuple[Tensor, Any, Any]) -> Callable[[Tensor], Tensor]:
    """A layer as a function of the state alone."""

    def run(x: Tensor) -> Tensor:
        out = module(x, *call[1], **call[2])
        return out[0] if isinstance(out, tuple) else out

    return run


def by_reference(model: GraftedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits ``(b, s, vocab)`` from the reference and the workflow's own modules."""
    graft, base, anatomy = model.workflow().graft, model.base, model.anatomy
    table = graft.embedding or base.get_input_embeddings()
    embeds = table(inputs["input_ids"]).clone()
    projected = project(model, inputs["image_features"])
    embeds[inputs["mm_token_type_ids"] == 1] = projected.flatten(0, 1)
    calls = layer_calls(model, embeds, inputs["attention_mask"])
    layers = decoder_layers(base, anatomy)
    gated = graft.config.structure != "c"
    states = iaa_reference(
        [calling(layer, call) for layer, call in zip(layers, calls, strict=True)],
        {i: calling(graft.layers[k], calls[i]) for k, i in enumerate(graft.layer_indices)},
        {i: graft.gates[k] for k, i in enumerate(graft.layer_indices)} if gated else {},
        graft.config.structure,
        calls[0][0],
    )
    norm = graft.norm or get_path(base, anatomy.norm_path)
    head = graft.head or get_path(base, anatomy.head_path)
    logits = head(norm(states[-1])) * anatomy.logit_scale
    cap = anatomy.logit_softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap


@every_architecture
@pytest.mark.parametrize("method", ["iaa-a", "iaa-b", "iaa-c"])
@torch.no_grad()
def test_logits_are_the_references(arch: str, method: str) -> None:
    model = grafted(arch, method)
    inputs = batch(rows(*WORDS), "left")
    real = inputs["attention_mask"].bool()
    found, expected = logits_of(model, inputs), by_reference(model, inputs)
    assert distance(found[real], expected[real]) < (1e-5 if arch in MIXTURES else 5e-6)


@pytest.mark.parametrize("structure", ["a", "b"])
@torch.no_grad()
def test_a_scalar_gate(structure: str) -> None:
    config = IAAConfig(layers=[1, 2, 3], structure=structure, gate="scalar")
    model = perturb(graft_on("llama", config))
    assert [p.numel() for p in model.workflow().graft.gates.parameters()] == [1, 1, 1]
    inputs = batch(rows(*WORDS))
    assert distance(logits_of(model, inputs), by_reference(model, inputs)) < 5e-6


def test_structures_differ_from_one_another() -> None:
    """With one set of weights: none of the three is another one under a different name."""
    found = []
    inputs = batch(rows(*WORDS))
    for structure in "abc":
        model = perturb(graft_on("llama", IAAConfig(layers=[0, 2], structure=structure)))
        found.append(logits_of(model, inputs))
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert distance(found[one], found[other]) > 1e-2


@every_architecture
def test_a_new_workflow_owns_copies(arch: str) -> None:
    model = graft_on(arch, CONFIGS["iaa-c"])
    graft, anatomy, base = model.workflow().graft, model.anatomy, plain(arch)
    pairs = [(graft.layers[k], decoder_layers(base, anatomy)[i]) for k, i in enumerate([0, 3])]
    pairs += [
        (graft.embedding, get_path(base, anatomy.embedding_path)),
        (graft.norm, get_path(base, anatomy.norm_path)),
        (graft.head, get_path(base, anatomy.head_path)),
    ]
    bases = {p.data_ptr() for p in model.base.parameters()}
    for mine, theirs in pairs:
        copied = mine.state_dict()
        assert copied.keys() == theirs.state_dict().keys()
        assert all(torch.equal(copied[k], v) for k, v in theirs.state_dict().items())
        assert not bases & {p.data_ptr() for p in mine.parameters()}
        assert type(mine) is type(theirs)
    tied = graft.head.weight is graft.embedding.weight
    assert tied == anatomy.tied
    assert graft.shares() == ({"head.weight"} if tied else set())


@pytest.mark.parametrize("gate", ["linear", "scalar"])
@pytest.mark.parametrize("structure", ["a", "b"])
def test_every_gate_starts_shut(structure: str, gate: str) -> None:
    config = IAAConfig(layers=[0, 2], structure=structure, gate=gate)
    graft = graft_on("llama", config).workflow().graft
    assert len(graft.gates) == 2
    for one in graft.gates:
        assert list(one.parameters())
        assert not one(torch.randn(3, graft.anatomy.hidden_size)).any()


@pytest.mark.parametrize(
    ("arch", "settings", "own"),
    [
        ("llama", {"embedding": False, "norm": False, "head": False}, set()),
        ("llama", {"head": False}, {"embedding", "norm"}),
        ("qwen2", {"embedding": False}, {"norm", "head"}),
        ("qwen2", {"untie": True}, {"embedding", "norm", "head"}),
    ],
)
def test_each_own_module_is_optional(arch: str, settings: dict, own: set[str]) -> None:
    model = perturb(graft_on(arch, IAAConfig(layers=[1], **settings)))
    graft = model.workflow().graft
    assert {n for n in ("embedding", "norm", "head") if getattr(graft, n) is not None} == own
    if own >= {"embedding", "head"}:
        assert graft.head.weight is not graft.embedding.weight
    inputs = batch(rows(*WORDS), "left")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = by_reference(model, inputs)
    assert distance(logits_of(model, inputs)[real], expected[real]) < 5e-6


def test_layers_that_are_not_there_are_refused() -> None:
    for layers, says in [([1, 4], "4"), ("last:9", "9"), ("0-7:2", "layer 4")]:
        with pytest.raises(UsageError, match=says):
            graft_on("llama", IAAConfig(layers=layers))


@pytest.mark.parametrize("gate", ["linear", "scalar"])
@pytest.mark.parametrize("structure", ["a", "b", "c"])
def test_every_module_beside_a_layer_is_said_to_be_there(structure: str, gate: str) -> None:
    """So that it goes to the layer's card, and is a piece of it for FSDP."""
    config = IAAConfig(layers=[0, 3], structure=structure, gate=gate)
    graft = graft_on("llama", config).workflow().graft
    there = graft.layer_modules()
    assert {index for index, _ in there} == {0, 3}
    found = [id(p) for _, module in there for p in module.parameters()]
    own = {"embedding", "norm", "head"}
    wanted = [id(p) for name, p in graft.named_parameters() if name.split(".")[0] not in own]
    assert sorted(found) == sorted(wanted)
    groups = graft.groups()
    assert {id(p) for p in groups["layers"]} == set(wanted)
    assert all(
        id(p) in {id(q) for q in groups[name]}
        for name in own
        for p in getattr(graft, name).parameters()
    )


def test_slots_follow_one_another_over_all_workflows() -> None:
    """Two workflows in one cache never write to one slot."""
    from grafting import together

    made = [
        graft_on("llama", CONFIGS[method], workflow=name)
        for name, method in [("mm", "iaa-c"), ("winged", "wings"), ("grounding", "iaa-a")]
    ]
    model = together(*made)
    slots = []
    for name in ("mm", "grounding"):
        for layer in model.workflow(name).graft.layers:
            slots.append(layer.self_attn.layer_idx)
    assert slots == [5, 6, 11, 12]  # four of the base, the row slot, and four of Wings between
    assert model.workflow("winged").graft._first_slot == 7
