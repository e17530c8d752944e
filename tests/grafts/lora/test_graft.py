"""LoRA behind a gate: against a slow reference, its gates, what it adapts, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grafting import (
    CONFIGS,
    batch,
    distance,
    every_architecture,
    graft_on,
    grafted,
    logits_of,
    own,
    perturb,
    plain,
    project,
    rows,
    text_labels,
    together,
)
from mmgraft import GraftedModel, LoraConfig
from mmgraft.anatomy import examine_config
from mmgraft.errors import UsageError
from mmgraft.grafts.on_linears import Adapter
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.create import create_graft
from reference.lora import lora_reference
from tiny import VARIANTS, save_base, tiny_clip_dir, tiny_config, tiny_model

BOTH = ["lora", "lora-token"]
WORD = "tttiiiittiiiittttt"
MOE = ["qwen3_moe", "mixtral", "gpt_oss"]


def adapters_of(model: GraftedModel) -> dict[str, Adapter]:
    """The adapters by the names that linear layers have in the base."""
    found = {}
    for name, part in model.workflow().graft.named_modules():
        if isinstance(part, Adapter):
            _, index, linear = name.split(".", 2)
            found[f"{model.anatomy.layers_path}.{index}.{linear}"] = part
    return found


@pytest.mark.parametrize("method", BOTH)
@torch.no_grad()
def test_it_computes_what_the_reference_does(method: str) -> None:
    model, inputs = grafted("llama", method), batch(rows(WORD))
    config = model.base.config.to_dict()
    config["rope_theta"] = model.anatomy.rope_theta
    kinds = inputs["mm_token_type_ids"][0]
    embeds = model.base.get_input_embeddings()(inputs["input_ids"][0]).clone()
    embeds[kinds == 1] = project(model, inputs["image_features"]).flatten(0, 1)
    given = CONFIGS[method]
    scale = {"lora": 6.0 / 4, "lora-token": 1.0}[method]
    assert given.scale == scale
    pairs = {n: (a.down.weight, a.up.weight) for n, a in adapters_of(model).items()}
    assert len(pairs) == 7 * 4
    gate = torch.ones_like(kinds).bool() if method == "lora" else kinds == 1
    expected = lora_reference(model.base.state_dict(), pairs, scale, config, embeds, gate)
    assert distance(logits_of(model, inputs)[0], expected) < 1e-4 * expected.abs().max()
    shut = lora_reference(model.base.state_dict(), {}, scale, config, embeds, gate)
    assert distance(expected, shut) > 1e-2


@every_architecture
@torch.no_grad()
def test_every_adapter_is_called_and_moves_the_image_row(arch: str) -> None:
    """A linear layer that its model reads past would leave its adapter unheard."""
    model, inputs = graft_on(arch, LoraConfig(rank=3, gate="token")), batch(rows("ttiiiitttt"))
    silent, found = logits_of(model, inputs), adapters_of(model)
    assert len(found) >= 4 * 2
    for name, adapter in found.items():
        adapter.up.weight.normal_()  # a constant would be the mean that a LayerNorm takes away
        assert distance(logits_of(model, inputs), silent) > 1e-4, name
        adapter.up.weight.zero_()
    assert torch.equal(logits_of(model, inputs), silent)


def test_what_is_adapted_is_what_targets_say() -> None:
    def found(**settings: Any) -> set[str]:
        model = graft_on("phi3", LoraConfig(rank=2, **settings))
        return set(adapters_of(model))

    fused = {f"model.layers.{i}.self_attn.{n}" for i in range(4) for n in ("qkv_proj", "o_proj")}
    feeds = {f"model.layers.{i}.mlp.{n}" for i in range(4) for n in ("gate_up_proj", "down_proj")}
    assert found(targets="attention") == fused
    assert found(targets="feedforward") == feeds
    assert found() == fused | feeds
    assert found(layers=[2]) == {name for name in fused | feeds if ".2." in name}


@pytest.mark.parametrize("arch", ["gpt2", "starcoder2", "opt_post_norm"])
def test_turned_linear_layers_have_their_own_widths(arch: str) -> None:
    """GPT-2's weights lie the other way round; OPT's feed-forward is in the layer itself."""
    sizes = examine_config(tiny_config(arch)).linears[1]
    layer = tiny_model(arch).get_submodule(examine_config(tiny_config(arch)).layers_path)[1]  # type: ignore[index]
    for name, (size, out) in sizes.items():
        assert layer.get_submodule(name)(torch.zeros(1, size)).shape == (1, out)
    assert len(sizes) >= 4


@pytest.mark.parametrize("arch", MOE)
def test_of_a_mixture_of_experts_the_attention_alone_is_adapted(arch: str) -> None:
    model = graft_on(arch, LoraConfig(rank=2))
    assert all(".self_attn." in name for name in adapters_of(model))
    assert set(model.workflow().graft.groups()) == {"attention"}
    with pytest.raises(UsageError, match=r"layer 0 of .* experts .* --targets attention"):
        graft_on(arch, LoraConfig(rank=2, targets="feedforward"))


def test_dense_layers_among_experts_are_adapted_whole() -> None:
    assert "qwen3_moe_mixed" in VARIANTS
    names = adapters_of(graft_on("qwen3_moe_mixed", LoraConfig(rank=2)))
    assert {name.split(".")[2] for name in names if ".mlp." in name} == {"0", "2"}
    chosen = LoraConfig(rank=2, targets="feedforward", layers=[0, 2])
    assert all(".mlp." in name for name in adapters_of(graft_on("qwen3_moe_mixed", chosen)))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def test_experts_in_a_list_are_no_linear_layers_of_their_rows() -> None:
    from mmgraft.anatomy.inspection import leaf_linears

    layer = nn.Module()
    layer.mlp, layer.out = Experts(), nn.Linear(4, 3)
    assert leaf_linears(layer) == {"out": (4, 3)}


@pytest.mark.parametrize("method", BOTH)
def test_one_batch_may_mix_two_adapters_text_and_another_method(method: str) -> None:
    """Trap: one gate a call. Here each row has its own, whatever stands beside it."""
    other = LoraConfig(rank=2, targets="attention", gate="row")
    made = {
        "mm": perturb(graft_on("llama", CONFIGS[method])),
        "second": perturb(graft_on("llama", other, workflow="second"), seed=5),
        "third": perturb(graft_on("llama", CONFIGS["wings"], workflow="third"), seed=6),
    }
    model = together(*made.values())
    words = ("ttiiiittt", "tttttttt", "iiiittiiiitt", "tttiiiittttt", "tiiiitt")
    names = ["mm", "text", "second", "third", "mm"]
    inputs = batch(rows(*words), "left")
    found = own(logits_of(model, inputs, workflow=names), inputs)
    for each, name, mine in zip(rows(*words), names, found, strict=True):
        alone = batch([each])
        one = plain("llama") if name == "text" else made[name]
        options = {} if name == "text" else {"workflow": name}
        assert distance(mine, logits_of(one, alone, **options)[0]) < 1e-5, name


@pytest.mark.parametrize("method", BOTH)
def test_no_adapter_runs_for_text_and_token_gates_cost_nothing_in_decoding(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = grafted("llama", method), []
    original = Adapter.forward

    def counted(self: Adapter, x: Any) -> Any:
        calls.append(x.shape[:-1].numel())
        return original(self, x)

    monkeypatch.setattr(Adapter, "forward", counted)
    logits_of(model, batch(rows("ttttt", "ttttttt")))
    assert calls == []
    inputs = batch(rows("ttiiiitt", "tttttttt"))
    logits_of(model, inputs)
    assert set(calls) == {8 if method == "lora" else 4}  # positions of the image row, image ones
    calls.clear()
    with torch.no_grad():
        out = model(**batch(rows("ttiiiitt")))
        calls.clear()
        model(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values)
    assert set(calls) == ({1} if method == "lora" else set())


@pytest.mark.parametrize("method", BOTH)
def test_an_infinite_adapter_leaves_text_rows_finite(method: str) -> None:
    """Trap: 0 times inf. What is not chosen is not multiplied by zero."""
    model = perturb(graft_on("llama", CONFIGS[method]))
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.up.weight.fill_(torch.inf)
    inputs = batch(rows("ttttiiii", "tttttttt"))
    found = logits_of(model, inputs)
    assert torch.isfinite(found[1]).all()
    assert not torch.isfinite(found[0, -1]).all()


@pytest.mark.parametrize("method", BOTH)
def test_a_forward_switches_no_gradient(method: str) -> None:
    """Trap: published code flips requires_grad in every forward."""
    model = graft_on("llama", CONFIGS[method])
    model.set_trainable(["projector", "attention"])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    inputs = batch(rows("ttiiiitt", "tttttttt"))
    model.train()(**inputs, labels=text_labels(inputs)).loss.backward()
    logits_of(model, batch(rows("tttt")))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    trained = {n for n, p in model.named_parameters() if p.grad is not None and "adapt" not in n}
    assert any(".attention." in name for name in trained)
    assert not any(".feedforward." in name for name in trained)


def test_a_fresh_adapter_starts_as_published_code_meant() -> None:
    """Trap: XComposer2's own start asks for other names, and leaves B as it was drawn."""
    torch.manual_seed(0)
    adapter = Adapter((64, 8), rank=16)
    assert not adapter.up.weight.any()
    bound = adapter.down.weight.abs().max().item()
    assert 0.9 * 64**-0.5 < bound <= 64**-0.5  # Kaiming uniform with a = sqrt(5)


def test_dropout_acts_in_training_alone() -> None:
    model = perturb(graft_on("llama", LoraConfig(rank=4, dropout=0.5)))
    inputs = batch(rows("ttiiiitttt"))
    still = logits_of(model, inputs)
    assert torch.equal(logits_of(model, inputs), still)
    model.set_trainable(["graft"])
    model.train()
    assert distance(logits_of(model, inputs), still) > 1e-3
    assert torch.equal(logits_of(model.eval(), inputs), still)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 33}, "rank 33 is above the width 32"),
        ({"rank": 2, "layers": [0, 7]}, "layer 7 does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "llama")
    tower = tiny_clip_dir(tmp_path / "tower")
    with pytest.raises(UsageError, match=says):
        create_graft(str(base), str(tower), LoraConfig(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gate": "column"}, "'row' or 'token'"),
        ({"targets": "head"}, "'all', 'attention' or 'feedforward'"),
        ({"target": "all"}, "did you mean 'targets'"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"alpha": 0}, "greater than 0"),
        ({"dropout": 1}, "less than 1"),
    ],
)
def test_settings_that_do_not_exist(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        LoraConfig.parse(settings, "config")


def test_layers_without_linear_layers_are_refused_by_name() -> None:
    import dataclasses

    anatomy = dataclasses.replace(examine_config(tiny_config("llama")), linears={0: {}, 1: {}})
    reason = get_method("lora").refuses(anatomy)
    assert "no linear layers" in (reason or "")


def test_a_stage_cannot_train_the_base() -> None:
    stage = get_method("lora").stage()
    with pytest.raises(ValueError, match="keeps its base frozen"):
        stage.check_switches(["projector", "base"])


def test_a_plain_decoder_lacks_its_adapters() -> None:
    method = get_method("lora")
    assert method.as_decoder is not None
    assert method.as_decoder(LoraConfig(), False).lacks == ""
    assert "lacks the adapters" in method.as_decoder(LoraConfig(), True).lacks
    with pytest.raises(UsageError, match="image positions alone"):
        method.as_decoder(LoraConfig(gate="token"), True)


def test_it_is_saved_and_loaded_by_the_names_of_the_linear_layers(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2")
    tower = tiny_clip_dir(tmp_path / "tower")
    create_graft(str(base), str(tower), LoraConfig(rank=2, layers=[1]), tmp_path / "run")
    model = perturb(GraftedModel.from_pretrained(tmp_path / "run"))
    model.save_pretrained(tmp_path / "saved")
    again = GraftedModel.from_pretrained(tmp_path / "saved")
    names = {name for name in again.workflow().state_dict() if name.startswith("graft.")}
    assert "graft.attention.1.attn.c_attn.down.weight" in names
    assert "graft.feedforward.1.mlp.c_fc.up.weight" in names
    inputs = batch(rows("ttiiiitt"))
    inputs["image_features"] = inputs["image_features"][..., :16]
    assert torch.equal(logits_of(model, inputs), logits_of(again, inputs))
