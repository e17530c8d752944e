"""The visual expert: against a slow reference, what has one, what it costs, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expert_weights import by_hand, experts_of, weights_of
from grafting import (
    CONFIGS,
    batch,
    distance,
    every_architecture,
    fresh,
    graft_on,
    grafted,
    logits_of,
    own,
    perturb,
    plain,
    rows,
    text_labels,
    together,
)
from mmgraft import ExpertConfig, GraftedModel, LoraConfig
from mmgraft.errors import UsageError
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.create import create_graft
from tiny import VARIANTS, save_base, tiny_clip_dir, tiny_model

WORD = "tttiiiittiiiittttt"
FORMS = {
    "full": ExpertConfig(),
    "every:2": ExpertConfig(layers="every:2"),
    "attention": ExpertConfig(parts=["attention"]),
    "feedforward": ExpertConfig(parts=["feedforward"], layers=[1, 3]),
    "rank": ExpertConfig(rank=3),
}
MOE = ["qwen3_moe", "mixtral", "gpt_oss"]


def of_form(form: str, arch: str = "llama") -> GraftedModel:
    return perturb(graft_on(arch, FORMS[form]), size=0.1)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_it_computes_what_the_reference_does(form: str) -> None:
    model, inputs = of_form(form), batch(rows(WORD))
    linears = {"full": 28, "every:2": 14, "attention": 16, "feedforward": 6, "rank": 28}
    assert len(weights_of(model)) == linears[form]
    expected = by_hand(model, inputs)
    assert distance(logits_of(model, inputs)[0], expected) < 1e-4 * expected.abs().max()
    for _, part in experts_of(model).items():
        for parameter in part.parameters():
            parameter.zero_()
    assert distance(expected, by_hand(model, inputs)) > 1e-2


@pytest.mark.parametrize("form", ["full", "rank"])
def test_loss_and_gradients_are_the_references(form: str) -> None:
    """In training the base multiplies text positions alone."""
    model, inputs = of_form(form), batch(rows(WORD))
    names = model.set_trainable(["projector", "graft"])
    model.train()
    loss = model(**inputs, labels=text_labels(inputs)).loss
    loss.backward()
    parameters = dict(model.named_parameters())
    found = {name: parameters[name].grad for name in names}
    model.zero_grad()
    labels = text_labels(inputs)[0, 1:]
    expected = nn.functional.cross_entropy(by_hand(model, inputs)[:-1], labels)
    expected.backward()
    assert abs(loss - expected) < 1e-5
    assert sum(".graft." in name for name in names) == (28 if form == "full" else 56)
    for name, gradient in found.items():
        wanted = parameters[name].grad
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5, msg=name)
        assert gradient.abs().max() > 0, name


@every_architecture
def test_every_expert_is_a_copy(arch: str) -> None:
    """Copy the bias too, in memory of its own; lora's tests hear every one of these layers."""
    model = fresh(arch, "expert")
    found, base = experts_of(model), model.base.state_dict()
    assert len(found) >= 4 * 2
    for name, expert in found.items():
        assert {f"{name}.{part}" for part, _ in expert.named_parameters()} == {
            key for key in base if key.rpartition(".")[0] == name
        }
        for part, tensor in expert.named_parameters():
            assert torch.equal(tensor, base[f"{name}.{part}"]), name
            assert tensor.data_ptr() != base[f"{name}.{part}"].data_ptr()


@pytest.mark.parametrize("arch", ["gpt2", "phi3", "qwen2_moe"])
@torch.no_grad()
def test_every_expert_moves_the_image_row(arch: str) -> None:
    model, inputs = graft_on(arch, CONFIGS["expert"]), batch(rows("ttiiiitttt"))
    silent = logits_of(model, inputs)
    for name, expert in experts_of(model).items():
        before = expert.weight.clone()
        expert.weight.normal_()
        assert distance(logits_of(model, inputs), silent) > 1e-4, name
        expert.weight.copy_(before)
    assert torch.equal(logits_of(model, inputs), silent)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "falcon", "gemma3"])
@torch.no_grad()
def test_fresh_copies_at_all_positions_are_the_base_to_the_bit(arch: str) -> None:
    """Trap: an expert that starts at random. Image positions alone are in this row."""
    model = fresh(arch, "expert")
    other = graft_on(arch, CONFIGS["llava"])
    other.workflow().projector.load_state_dict(model.workflow().projector.state_dict())
    inputs = batch(rows("iiiiiiii"))
    assert torch.equal(logits_of(model, inputs), logits_of(other, inputs))
    assert distance(logits_of(grafted(arch, "expert"), inputs), logits_of(other, inputs)) > 1e-2


@pytest.mark.parametrize("arch", MOE)
def test_of_a_mixture_of_experts_the_attention_has_visual_ones(arch: str) -> None:
    model = graft_on(arch, ExpertConfig())
    assert all(".self_attn." in name for name in experts_of(model))
    assert set(model.workflow().graft.groups()) == {"attention"}
    with pytest.raises(UsageError, match=r"layer 0 of .* feedforward.* --parts attention"):
        graft_on(arch, ExpertConfig(parts=["feedforward"]))


@torch.no_grad()
def test_shared_experts_of_a_mixture_have_visual_ones_and_no_gate_has() -> None:
    """Each token of a row goes through them, in its place; text stays as it is."""
    assert "qwen2_moe" in VARIANTS
    model, inputs = graft_on("qwen2_moe", ExpertConfig()), batch(rows("ttiiiittt", "ttttttttttt"))
    names = {name.split(".", 3)[3] for name in experts_of(model) if ".mlp." in name}
    assert names == {f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")}
    before = logits_of(model, inputs)
    for name, expert in experts_of(model).items():
        if "shared_expert" in name:
            expert.weight.normal_()
    after = logits_of(model, inputs)
    assert distance(after[0, :2], before[0, :2]) < 1e-5 < distance(after[0, 2:9], before[0, 2:9])
    assert distance(after[1], before[1]) < 1e-5


@torch.no_grad()
def test_one_batch_may_mix_experts_text_and_another_method() -> None:
    """Trap: one set of weights a call. Here each row has its own, whatever stands beside it."""
    other = LoraConfig(rank=2, gate="row")
    made = {
        "mm": of_form("full"),
        "second": perturb(graft_on("llama", FORMS["rank"], workflow="second"), seed=5),
        "third": perturb(graft_on("llama", other, workflow="third"), seed=6),
    }
    model = together(*made.values())
    words = ("tttttttt", "ttiiiittt", "iiiittiiiitt", "tttiiiittttt", "tiiiitt")
    names = ["text", "mm", "second", "third", "mm"]
    inputs = batch(rows(*words), "left")
    found = own(logits_of(model, inputs, workflow=names), inputs)
    for each, name, mine in zip(rows(*words), names, found, strict=True):
        one = plain("llama") if name == "text" else made[name]
        options = {} if name == "text" else {"workflow": name}
        assert distance(mine, logits_of(one, batch([each]), **options)[0]) < 1e-5, name


def calls_of(model: GraftedModel) -> list[tuple[str, int]]:
    """Positions that the base ("W"; patched "P") and the expert ("I") of a projection multiply."""
    seen: list[tuple[str, int]] = []
    name = "model.layers.0.mlp.up_proj"
    for kind, part in (("W", model.base.get_submodule(name)), ("I", experts_of(model)[name])):
        original = part.forward

        def counted(x: Tensor, kind: str = kind, part: Any = part, original: Any = original) -> Any:
            patched = part.__dict__["forward"] is not part.__dict__["counted"]
            seen.append(("P" if patched else kind, x.shape[:-1].numel()))
            return original(x)

        part.__dict__["forward"] = part.__dict__["counted"] = counted
    return seen


def test_what_it_costs() -> None:
    """Text: the base's price. In training no position is multiplied twice; a decoded token is the
    base's alone, and nothing is patched for it."""
    model, inputs = of_form("full"), batch(rows("ttiiiitt", "tttttttt"))
    calls = calls_of(model)
    logits_of(model, batch(rows("ttttt", "ttttttt")))
    assert [kind for kind, _ in calls] == ["W"]
    calls.clear()
    logits_of(model, inputs)
    assert sorted(calls) == [("I", 4), ("P", 16)]
    calls.clear()
    with torch.no_grad():
        out = model(**batch(rows("ttiiiitt")))
        calls.clear()
        model(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values)
    assert calls == [("W", 1)]
    calls.clear()
    model.set_trainable(["projector", "graft"])
    model.train()
    model(**inputs, labels=text_labels(inputs)).loss.backward()
    assert sorted(calls) == [("I", 4), ("P", 12)]


def test_an_infinite_expert_leaves_text_finite() -> None:
    """Trap: 0 times inf. What is not chosen is not multiplied by zero."""
    model = of_form("full")
    with torch.no_grad():
        for expert in experts_of(model).values():
            expert.weight.fill_(torch.inf)
    found = logits_of(model, batch(rows("ttttiiii", "tttttttt")))
    assert torch.isfinite(found[1]).all()
    assert not torch.isfinite(found[0, -1]).all()


def test_a_forward_switches_no_gradient() -> None:
    model = graft_on("llama", FORMS["full"])
    model.set_trainable(["projector", "attention"])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    inputs = batch(rows("ttiiiitt", "tttttttt"))
    model.train()(**inputs, labels=text_labels(inputs)).loss.backward()
    logits_of(model, batch(rows("tttt")))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert any(".attention." in name for name in trained)
    assert not any(".feedforward." in name for name in trained)


@pytest.mark.parametrize("config", [FORMS["full"], FORMS["rank"]])
def test_vectors_that_are_no_positions_are_refused(config: ExpertConfig) -> None:
    """As latents of all keys are, from a cache: image positions would be looked for among them."""
    model = graft_on("llama", config)
    norm = model.base.get_submodule("model.layers.1.post_attention_layernorm")
    norm.register_forward_hook(lambda _, __, out: torch.stack([out, out]))
    with pytest.raises(UsageError, match="given 16 vectors where there are 8 positions"):
        logits_of(model, batch(rows("ttiiiitt")))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 33}, "rank 33 is above the width 32"),
        ({"layers": [0, 7]}, "layer 7 does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "llama")
    tower = tiny_clip_dir(tmp_path / "tower")
    with pytest.raises(UsageError, match=says):
        create_graft(str(base), str(tower), ExpertConfig(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"parts": ["head"]}, "'attention' or 'feedforward'"),
        ({"parts": []}, "at least 1"),
        ({"part": ["attention"]}, "did you mean 'parts'"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"image_positions": "same"}, "'each' or 'shared'"),
    ],
)
def test_settings_that_do_not_exist(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ExpertConfig.parse(settings, "config")


def test_a_stage_cannot_train_the_base() -> None:
    with pytest.raises(ValueError, match="keeps its base frozen"):
        get_method("expert").stage().check_switches(["projector", "base"])


def test_it_is_no_plain_decoder() -> None:
    method = get_method("expert")
    assert method.as_decoder is not None
    assert method.as_decoder(ExpertConfig(), False).layers is None
    with pytest.raises(UsageError, match="one set of weights for both"):
        method.as_decoder(ExpertConfig(), True)


@pytest.mark.parametrize(("arch", "dtype"), [("gpt2", torch.float32), ("qwen2", torch.bfloat16)])
def test_it_is_made_from_files_saved_and_loaded(
    arch: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Copies of the files' tensors in the base's dtype, biases too, by the names in the base."""
    base = save_base(tmp_path / "base", arch, dtype=dtype)
    tower = tiny_clip_dir(tmp_path / "tower")
    create_graft(str(base), str(tower), ExpertConfig(layers=[1]), tmp_path / "run")
    model = GraftedModel.from_pretrained(tmp_path / "run")
    original = tiny_model(arch, dtype=dtype).state_dict()
    for name, expert in experts_of(model).items():
        for part, tensor in expert.named_parameters():
            assert torch.equal(tensor, original[f"{name}.{part}"]), name
    perturb(model).save_pretrained(tmp_path / "saved")
    again = GraftedModel.from_pretrained(tmp_path / "saved")
    names = {name for name in again.workflow().state_dict() if name.startswith("graft.")}
    attention, feed = {"gpt2": ("attn.c_attn", "mlp.c_fc")}.get(
        arch, ("self_attn.q_proj", "mlp.down_proj")
    )
    assert f"graft.attention.1.{attention}.bias" in names
    assert f"graft.feedforward.1.{feed}.weight" in names
    inputs = batch(rows("ttiiiitt"))
    inputs["image_features"] = inputs["image_features"][..., :16]
    assert torch.equal(logits_of(model, inputs), logits_of(again, inputs))
