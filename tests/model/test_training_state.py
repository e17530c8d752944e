"""Check what is trained, in which precision and mode, and the gradients that reach it."""

from __future__ import annotations

import pytest
import torch

from grafting import (
    CONFIGS,
    batch,
    distance,
    every_method,
    graft_on,
    grafted,
    logits_of,
    perturb,
    plain,
    rows,
    text_labels,
    trained_groups,
)
from mmgraft import GraftedModel, IAAConfig, LlavaConfig
from mmgraft.errors import UsageError
from mmgraft.published.wings.config import OfficialWingsConfig
from mmgraft.vision.towers.base import VisionTower
from tiny import tiny_model, tiny_tower

WORDS = ("ttiiiitttttt", "iiiittiiiittt", "ttttttttt")
GROUPS = {
    "iaa-a": {"layers", "embedding", "norm", "head"},
    "iaa-b": {"layers", "embedding", "norm", "head"},
    "iaa-c": {"layers", "embedding", "norm", "head"},
    "wings": {"learners.visual", "learners.textual", "router"},
    "llava": set(),
    "lora": {"attention", "feedforward"},
    "lora-token": {"attention", "feedforward"},
    "expert": {"attention", "feedforward"},
    "xattn": {"attention", "feedforward", "gates", "marker"},
}


def gradients(model: GraftedModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    inputs = batch(rows(*WORDS), "left")
    model(**inputs, labels=text_labels(inputs)).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@every_method
def test_groups_cover_the_graft_and_do_not_overlap(method: str) -> None:
    model = graft_on("llama", CONFIGS[method])
    groups = model.groups()
    both = {"learners"} if method == "wings" else set()  # a name for two groups
    assert set(groups) == {"projector", "graft", "base"} | GROUPS[method] | both
    parts = [id(p) for name in GROUPS[method] for p in groups[name]]
    assert len(parts) == len(set(parts))
    assert set(parts) == {id(p) for p in groups["graft"]}
    everything = {id(p) for p in model.parameters()}
    assert {id(p) for g in ("projector", "graft", "base") for p in groups[g]} == everything


@pytest.mark.parametrize(
    ("method", "groups", "prefixes"),
    [
        ("iaa-c", ["projector"], ["projector."]),
        ("iaa-b", ["layers", "norm"], ["graft.layers.", "graft.gates.", "graft.norm."]),
        ("iaa-c", ["embedding", "head"], ["graft.embedding.", "graft.head."]),
        ("wings", ["learners.visual", "projector"], ["graft.layers.*.visual.", "projector."]),
        ("wings", ["router"], ["graft.layers.*.router."]),
        ("lora", ["attention", "projector"], ["graft.attention.", "projector."]),
        ("expert", ["feedforward"], ["graft.feedforward."]),
        ("xattn", ["gates", "marker"], ["graft.blocks.*.gate", "graft.marker"]),
        ("llava", ["base"], ["base."]),
    ],
)
def test_exactly_these_are_trained_in_fp32(
    method: str, groups: list[str], prefixes: list[str]
) -> None:
    from fnmatch import fnmatch

    model = graft_on("llama", CONFIGS[method], dtype=torch.bfloat16)
    model.set_trainable(trained_groups(method))  # what an earlier stage trained is frozen again
    before = {name: p.dtype for name, p in model.named_parameters()}
    names = model.set_trainable(groups)
    patterns = [p if p == "base." else f"workflows.mm.{p}" for p in prefixes]
    wanted = {n for n in before if any(fnmatch(n, f"{pattern}*") for pattern in patterns)}
    assert set(names) == wanted
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in wanted)
        if name in wanted:
            assert parameter.dtype == torch.float32
        else:
            assert parameter.dtype == before[name]
    assert model.base_is_trained == (groups == ["base"])


def test_what_cannot_be_trained_is_refused() -> None:
    model = graft_on("llama", IAAConfig(layers=[1], embedding=False))
    with pytest.raises(UsageError, match=r"no parameters called 'embedding'.*head, layers"):
        model.set_trainable(["layers", "embedding"])
    with pytest.raises(UsageError, match="'router'"):
        model.set_trainable(["router"])
    config = OfficialWingsConfig(rank=4, system_prompt_length=2, image_token_length=4)
    official = graft_on("llama", config)
    with pytest.raises(UsageError, match="--method wings"):
        official.set_trainable(["graft"])
    assert not any(p.requires_grad for p in (*model.parameters(), *official.parameters()))


@every_method
def test_frozen_modules_stay_in_eval_mode(method: str) -> None:
    model = GraftedModel.graft(tiny_model("gpt2"), tiny_tower(), CONFIGS[method])
    tower = model.vision_tower
    assert isinstance(tower, VisionTower)
    model.set_trainable(["projector"])
    model.train()
    workflow = model.workflow()
    assert model.training
    assert workflow.projector.training
    frozen = [model.base, tower, *workflow.graft.children()]
    assert not any(m.training for part in frozen for m in part.modules())
    model.set_trainable(trained_groups(method))  # goes on in training mode
    children = list(workflow.graft.children())
    assert all(m.training for part in children for m in part.modules())
    assert not any(m.training for part in (model.base, tower) for m in part.modules())
    model.set_trainable(["base"])
    assert model.base.training
    assert not workflow.projector.training
    model.eval()
    assert not any(m.training for m in model.modules())


def test_dropout_acts_in_trained_layers_only() -> None:
    """GPT-2's dropout would blur the base."""
    model, inputs = graft_on("gpt2", CONFIGS["iaa-c"]), batch(rows(*WORDS), "left")
    calm = logits_of(model, inputs)
    model.set_trainable(["projector", "norm"])
    model.train()
    assert torch.equal(logits_of(model, inputs), calm)
    model.set_trainable(["layers"])
    blurred = logits_of(model, inputs)
    assert distance(blurred[0], calm[0]) > 1e-3
    assert distance(blurred[2], calm[2]) < 1e-5
    texts = batch(rows("tttttttt", "ttttttt"), "left")
    assert torch.equal(logits_of(model, texts), logits_of(plain("gpt2"), texts))


@pytest.mark.parametrize("untie", [False, True])
def test_a_tied_pair_stays_tied_when_it_is_cast(untie: bool) -> None:
    config = IAAConfig(layers=[1], untie=untie)
    model = graft_on("qwen2", config, dtype=torch.bfloat16)
    graft = model.workflow().graft
    names = model.set_trainable(["embedding", "head"])
    assert graft.embedding.weight.dtype == graft.head.weight.dtype == torch.float32
    assert (graft.head.weight is graft.embedding.weight) == (not untie)
    assert ("workflows.mm.graft.head.weight" in names) == untie
    assert graft.embedding.weight is not model.base.get_input_embeddings().weight


@every_method
@pytest.mark.parametrize("arch", ["llama", "gemma2", "bloom", "falcon", "gpt_oss"])
def test_checkpointing_gives_the_same_gradients(arch: str, method: str) -> None:
    model = perturb(graft_on(arch, CONFIGS[method]))
    model.set_trainable(trained_groups(method))
    model.train()
    plain_gradients = gradients(model)
    model.gradient_checkpointing_enable()
    again = gradients(model)
    assert again.keys() == plain_gradients.keys()
    for name, gradient in again.items():
        wanted = plain_gradients[name]
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6, msg=name)
    model.gradient_checkpointing_disable()
    assert torch.equal(gradients(model)[name], plain_gradients[name])


def test_checkpointing_does_run_layers_again() -> None:
    model = perturb(graft_on("llama", CONFIGS["iaa-c"]))
    model.set_trainable(["projector", "layers"])
    model.train()
    calls: list[int] = []
    inner = model.base.model.layers[1].input_layernorm
    inner.register_forward_hook(lambda *_: calls.append(1))
    gradients(model)
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    gradients(model)
    assert len(calls) == 3


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_checkpointing_with_a_base_that_is_trained(arch: str) -> None:
    model = graft_on(arch, LlavaConfig(base="full"))
    model.set_trainable(["base", "projector"])
    model.train()
    wanted = gradients(model)
    model.gradient_checkpointing_enable()
    found = gradients(model)
    assert any(name.startswith("base.") and g is not None for name, g in found.items())
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@every_method
def test_gradients_are_those_of_a_plain_forward(method: str) -> None:
    """The chunked head, the gates and the row selection lose nothing of the gradient."""
    model = perturb(graft_on("llama", CONFIGS[method]))
    model.set_trainable(trained_groups(method))
    model.train()
    found = gradients(model)
    model.zero_grad()
    inputs = batch(rows(*WORDS), "left")
    labels = text_labels(inputs)
    labels[2] = -100
    logits = model(**inputs, use_cache=False).logits
    shifted = labels[:, 1:].reshape(-1)
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    torch.nn.functional.cross_entropy(flat, shifted).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
            assert torch.isfinite(parameter.grad).all()


def test_parameters_trained_in_fp32_do_not_disturb_a_bf16_base() -> None:
    model, inputs = graft_on("llama", CONFIGS["wings"], dtype=torch.bfloat16), batch(rows(*WORDS))
    model.set_trainable(["projector", "graft"])
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=text_labels(inputs)).loss
    loss.backward()
    assert loss.dtype == torch.float32
    grown = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.dtype == torch.float32 for g in grown.values())
    reference = grafted("llama", "wings").base
    assert {p.dtype for p in model.base.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reference.parameters()} == {torch.float32}
