"""Gated cross-attention: against a slow reference, what acts where, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import grafting
from decoding import WORDS, worst
from grafting import (
    CONFIGS,
    batch,
    cross_entropy,
    distance,
    every_architecture,
    fresh,
    graft_on,
    logits_of,
    own,
    perturb,
    plain,
    project,
    row,
    rows,
    text_labels,
    text_of,
    together,
)
from mmgraft import GraftedModel, XattnConfig
from mmgraft.errors import UsageError
from mmgraft.grafts.registry import get_method
from mmgraft.grafts.xattn.graft import CrossAttention, FeedForward
from mmgraft.model.files.create import create_graft
from mmgraft.vision.plan import Plan
from mmgraft.vision.projectors.configs import PerceiverConfig
from reference.xattn import xattn_reference
from tiny import VARIANTS, save_base, tiny_clip_dir, tiny_model, tiny_tower

WORD = "ttittttitt"
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"layers": [0, 2]},
    "flamingo": {"preset": "flamingo", "heads": "3x8", "layers": [1, 3]},
    "linear": {
        "gate": "linear", "gate_size": "channel", "heads": "4x6/2", "attend": "latest",
        "layers": [2, 3], "feedforward": "4h",
    },
    "attention alone": {"feedforward": "none", "qk_norm": False, "marker": False, "layers": [0]},
}  # fmt: skip
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))


@pytest.fixture(autouse=True)
def _rows_of_this_method() -> Iterator[None]:
    grafting.takes("xattn")
    yield
    grafting.takes(None)


def made(**settings: Any) -> GraftedModel:
    return perturb(graft_on("llama", XattnConfig(**settings)))


def expected(model: GraftedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The reference's logits of a batch of one row."""
    graft: Any = model.workflow().graft
    config = model.base.config.to_dict()
    config["rope_theta"] = model.anatomy.rope_theta
    at = inputs["mm_token_type_ids"][0].nonzero().flatten().tolist()
    embeds = model.base.get_input_embeddings()(inputs["input_ids"][0]).clone()
    embeds[at] = graft.marker.vector
    vectors = project(model, inputs["image_features"])
    blocks = {
        int(index): {**dict(block.named_parameters())} for index, block in graft.blocks.items()
    }
    settings = graft.config
    return xattn_reference(
        dict(model.base.state_dict()),
        blocks,
        config,
        embeds,
        dict(zip(at, vectors, strict=True)),
        settings.head_shape(model.anatomy)[2],
        settings.attend == "latest",
        settings.gate == "linear",
    )


@every_setting
def test_it_computes_what_the_reference_does(settings: dict[str, Any]) -> None:
    """Logits at once, piece by piece from a cache, and the loss with all its gradients."""
    model, inputs = made(**settings), batch([row(WORD)])
    with torch.no_grad():
        wanted = expected(model, inputs)
    assert distance(logits_of(model, inputs)[0], wanted) < 2e-5 * wanted.abs().max()
    assert distance(in_pieces(model, inputs)[0], wanted) < 2e-5 * wanted.abs().max()
    model.set_trainable(["projector", "graft"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    labels = text_labels(inputs)
    cross_entropy(expected(model, inputs)[None], labels).backward()
    slow = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    for again in (False, True):
        model.zero_grad()
        model.train().gradient_checkpointing = again
        model(**inputs, labels=labels).loss.backward()
        assert slow.keys() == trained.keys()
        for name, parameter in trained.items():
            torch.testing.assert_close(
                parameter.grad, slow[name], atol=1e-5, rtol=1e-3, msg=f"{name} {again}"
            )


@torch.no_grad()
def in_pieces(model: GraftedModel, inputs: dict[str, Tensor], cache: Any = None) -> Tensor:
    """Logits from a cache: text, an image, text by one, a piece with another image, text."""
    found, shown = [], 0
    for start, end in ((0, 2), (2, 4), (4, 5), (5, 9), (9, 10)):
        given = {"input_ids": inputs["input_ids"][:, start:end]}
        kinds = inputs["mm_token_type_ids"][:, start:end]
        count = int(kinds.sum())
        if count:
            features = inputs["image_features"][shown : shown + count]
            given |= {"mm_token_type_ids": kinds, "image_features": features}
            shown += count
        out = model(**given, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("attend", ["all", "latest"])
def test_earlier_text_never_reads_a_later_image(attend: str) -> None:
    """Trap: every cached position sees the last image. The first answer is scored after it."""
    model, inputs = made(layers=[0, 2], attend=attend), batch([row(WORD)])
    found = in_pieces(model, inputs)
    assert distance(found, logits_of(model, inputs)) < 1e-5
    one, other = inputs["image_features"].clone(), inputs["image_features"].clone()
    one[0] += 1.0
    other[1] += 1.0
    moved = [
        (logits_of(model, {**inputs, "image_features": each}) - found)[0].abs().amax(-1)
        for each in (one, other)
    ]
    assert moved[0][:2].max() < 1e-5
    assert moved[0][2:7].min() > 1e-4
    assert moved[1][:7].max() < 1e-5
    assert moved[1][7:].min() > 1e-4


def test_the_latest_image_is_read_alone() -> None:
    """In a block: what an earlier image changes comes through the base's own attention."""
    model, inputs = made(layers=[3], attend="latest"), batch([row(WORD)])
    other = inputs["image_features"].clone()
    other[0] += 1.0
    moved = logits_of(model, {**inputs, "image_features": other}) - logits_of(model, inputs)
    assert moved[0, 7:].abs().max() == 0
    assert moved[0, 2:7].abs().amax(-1).min() > 1e-4


@every_architecture
def test_a_fresh_graft_is_the_base_on_the_same_embeddings(arch: str) -> None:
    """Level E3, bit for bit, the marker among the embeddings: the mean of the base's."""
    model, base = fresh(arch, "xattn"), plain(arch)
    inputs = batch(rows("ttittttt", "iittt", "tttti"), "left")
    mask, kinds = inputs["attention_mask"], inputs["mm_token_type_ids"] == 1
    embedding = base.get_input_embeddings()
    embeds = embedding(inputs["input_ids"]).detach().clone()
    every = embedding(torch.arange(model.anatomy.vocab_size)).detach()
    marker = model.workflow().graft.marker.vector  # type: ignore[union-attr]
    assert distance(marker, every.mean(0)) < 1e-6
    embeds[kinds] = marker
    extra = {} if arch == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    wanted = logits_of(base, {"inputs_embeds": embeds, "attention_mask": mask, **extra})
    assert torch.equal(logits_of(model, inputs), wanted)


@every_architecture
def test_trained_blocks_speak(arch: str) -> None:
    """Each of a block's parts moves the rows that see, on every base."""
    model, inputs = perturb(graft_on(arch, CONFIGS["xattn"])), batch(rows("ttittttt"))
    whole = logits_of(model, inputs)
    for _, _, half in model.workflow().graft._halves():  # type: ignore[operator]
        before = half.gate.detach().clone()
        half.gate.data.zero_()
        assert distance(logits_of(model, inputs), whole) > 1e-3
        half.gate.data.copy_(before)
    with torch.no_grad():
        model.workflow().graft.marker.vector.normal_()  # type: ignore[operator,union-attr]
    assert distance(logits_of(model, inputs), whole) > 1e-3


@every_setting
def test_nothing_acts_where_no_image_is_seen(settings: dict[str, Any]) -> None:
    """Traps: a feed-forward without an image, and a position without one that reads them all.

    Gates are set to 1 by hand. The base on the same batch is met bit for bit.
    """
    model = made(**settings)
    for _, _, half in model.workflow().graft._halves():  # type: ignore[operator]
        half.gate.data.fill_(1.0)
    inputs = batch(rows("tttttttt", "ttttiittt", "tttittittt"), "left")
    mask, kinds = inputs["attention_mask"], inputs["mm_token_type_ids"]
    base = {**text_of(inputs), "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    wanted, found = logits_of(plain("llama"), base), logits_of(model, inputs)
    blind = (kinds.cumsum(1) == 0) & (mask == 1)
    assert blind.sum() == 8 + 4 + 3
    assert torch.equal(found[blind], wanted[blind])
    sees = (kinds.cumsum(1) > 0) & (mask == 1)
    assert (found - wanted)[sees].abs().amax(-1).min() > 1e-3


def test_an_infinite_block_leaves_text_rows_finite() -> None:
    """Trap: 0 times inf. What is not chosen is not multiplied by zero."""
    model = made(layers=[0, 2])
    with torch.no_grad():
        for part in model.workflow().graft.modules():
            if isinstance(part, CrossAttention | FeedForward):
                part.norm.weight.fill_(torch.inf)
    inputs = batch(rows("ttttii", "tttttt"))
    found = logits_of(model, inputs)
    assert torch.isfinite(found[1]).all()
    assert not torch.isfinite(found[0, -1]).all()


def test_a_spoilt_image_spoils_its_own_row_alone() -> None:
    """Vectors of other rows fill a batch's memory up, and are nobody's."""
    model, inputs = made(layers=[0, 2]), batch(rows("tittt", "tiittt"))
    wanted = logits_of(model, batch(rows("tittt")))[0]
    inputs["image_features"][1:] = torch.nan
    found = logits_of(model, inputs)
    assert distance(found[0, :5], wanted) < 1e-5
    assert torch.isnan(found[1, -1]).all()
    inputs = batch(rows("tittt", "tiittt"))
    inputs["image_features"][0] = torch.nan
    assert torch.isfinite(logits_of(model, inputs)[1]).all()


def test_a_forward_switches_no_gradient() -> None:
    """Trap: published code flips requires_grad inside a forward."""
    model = graft_on("llama", CONFIGS["xattn"])
    model.set_trainable(["projector", "gates", "marker"])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    inputs = batch(rows("ttitt", "ttttt"))
    model.train()(**inputs, labels=text_labels(inputs)).loss.backward()
    logits_of(model, batch(rows("tttt")))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    moved = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None}
    assert {"gate", "vector"} <= moved


def test_a_shut_gate_lets_nothing_but_gates_and_marker_learn() -> None:
    """While a gate is 0, what stands behind it gets no gradient."""
    model = graft_on("llama", CONFIGS["xattn"])
    model.set_trainable(["projector", "graft"])
    inputs = batch(rows("ttittttt"))
    model.train()(**inputs, labels=text_labels(inputs)).loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.rpartition(".")[2] for name in moved} == {"gate", "vector"}


def test_images_are_read_once() -> None:
    """Trap: cross keys and values computed again for every new token."""
    model, calls = made(layers=[0, 2]), []
    for block in model.workflow().graft.blocks.values():  # type: ignore[union-attr]
        block.attention.key.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    inputs = batch(rows("ttitt", "tiitt"), "left")
    model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert calls == [3 * grafting.PATCHES] * 2
    calls.clear()
    logits_of(model, batch(rows("ttttt")))
    model.generate(**text_of(batch(rows("ttttt"))), max_new_tokens=2, pad_token_id=2)
    assert calls == []


def test_one_batch_may_mix_it_with_methods_whose_images_stand_in_the_sequence() -> None:
    """Each row by its own workflow: an image is one position here and four there."""
    names = {"mm": "xattn", "second": "llava", "third": "wings", "fourth": "xattn"}
    models = {}
    for seed, (name, method) in enumerate(names.items()):
        config = XattnConfig(**SETTINGS["flamingo"]) if name == "fourth" else CONFIGS[method]
        models[name] = perturb(graft_on("llama", config, workflow=name), seed=seed)
    model = together(*models.values())
    words = {"mm": "ttitiitt", "text": "tttttt", "second": "ttiiiittt", "third": "iiiittt",
             "fourth": "ittittttt"}  # fmt: skip
    each = {}
    for name, word in words.items():
        grafting.takes(names.get(name))
        each[name] = row(word)
    inputs, runs = batch(list(each.values()), "left"), list(words)
    found = own(logits_of(model, inputs, workflow=runs), inputs)
    from_cache = own(cached(model, inputs, runs), inputs)
    for name, mine, again in zip(runs, found, from_cache, strict=True):
        alone = batch([each[name]])
        one, options = (
            (plain("llama"), {}) if name == "text" else (models[name], {"workflow": name})
        )
        assert distance(mine, logits_of(one, alone, **options)[0]) < 1e-5, name
        assert distance(mine, again) < 1e-5, name


@torch.no_grad()
def cached(model: GraftedModel, inputs: dict[str, Tensor], workflows: list[str]) -> Tensor:
    """Logits of a batch whose last two columns are decoded by one."""
    end = inputs["input_ids"].shape[1] - 2
    cut = {n: t if n == "image_features" else t[:, :end] for n, t in inputs.items()}
    out = model(**cut, workflow=workflows, use_cache=True)
    found = [out.logits]
    for at in (end, end + 1):
        step = {
            "input_ids": inputs["input_ids"][:, at : at + 1],
            "attention_mask": inputs["attention_mask"][:, : at + 1],
        }
        found.append(model(**step, past_key_values=out.past_key_values).logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("form", ["flamingo", "idefics2"])
def test_vectors_of_a_resampler_stay_apart(form: Any) -> None:
    """Trap: beside the sequence no position tells equal latents apart, for ever."""
    shape = PerceiverConfig(form=form, latents=3, layers=1, heads=2, head_dim=4, kv_heads=1)
    config = XattnConfig(**SETTINGS["llama"], gate_init=0.5)
    model = GraftedModel.graft(tiny_model("llama"), tiny_tower(), config, projector=shape)
    model.set_trainable(["projector"])
    inputs = batch([row("ttitttit", width=16)])
    projector = model.workflow().projector
    parameters = list(projector.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model.train()(**inputs, labels=text_labels(inputs)).loss.backward()
    optimizer.step()
    plans = [Plan.of_count(grafting.PATCHES)] * 2
    made = projector(inputs["image_features"].flatten(0, 1), plans).unflatten(0, (2, 3))
    apart = (made[:, :, None] - made[:, None]).abs().amax(-1)  # (images, 3, 3)
    assert apart[:, ~torch.eye(3).bool()].min() > 1e-2
    assert model.workflow().positions(plans[0]) == 1


def test_the_groups_are_the_graft() -> None:
    model = graft_on("llama", XattnConfig(layers=[1], feedforward="none", marker=False))
    groups = {name: list(part) for name, part in model.workflow().graft.groups().items()}
    assert set(groups) == {"attention", "gates", "marker"}
    assert groups["marker"] == []
    with pytest.raises(UsageError, match="no parameters called 'feedforward'"):
        model.set_trainable(["feedforward"])


def test_presets_are_what_their_papers_have() -> None:
    llama, flamingo = XattnConfig(), XattnConfig(preset="flamingo")
    assert llama.layers == flamingo.layers == "spread:8"
    assert (llama.attend, llama.heads, llama.qk_norm, llama.feedforward) == (
        "all", "base", True, "base",
    )  # fmt: skip
    assert (flamingo.attend, flamingo.heads, flamingo.qk_norm, flamingo.feedforward) == (
        "latest", "8x64", False, "4h",
    )  # fmt: skip
    assert (llama.layer_norm, flamingo.layer_norm) == (False, True)
    other = XattnConfig(preset="flamingo", attend="all")
    assert XattnConfig.parse(other.model_dump(), "again") == other
    assert other.attend == "all"
    model = graft_on("llama", XattnConfig(preset="flamingo", layers=[0]))
    attention = model.workflow().graft.blocks["0"].attention  # type: ignore[index,union-attr]
    assert attention.query.weight.shape == (8 * 64, 32)
    assert attention.value.weight.shape == (8 * 64, 32)
    grouped = graft_on("llama", XattnConfig(layers=[0])).workflow().graft.blocks["0"]  # type: ignore[index,union-attr]
    anatomy = model.anatomy
    assert grouped.attention.key.out_features == anatomy.num_kv_heads * anatomy.head_dim
    assert grouped.feedforward.up.out_features == model.base.config.intermediate_size


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gate": "sigmoid"}, "'tanh' or 'linear'"),
        ({"gate_size": "head"}, "'scalar' or 'channel'"),
        ({"attend": "none"}, "'all' or 'latest'"),
        ({"feedforward": "8h"}, "'base', '4h' or 'none'"),
        ({"preset": "idefics"}, "'llama' or 'flamingo'"),
        ({"heads": "8"}, "heads x width such as 8x64"),
        ({"heads": "0x64"}, "heads x width such as 8x64"),
        ({"heads": "8x64/3"}, "8 query heads cannot share 3 key heads evenly"),
        ({"gate_init": float("inf")}, "finite"),
        ({"layers": "spread"}, "in no known form"),
        ({"gates": "tanh"}, "did you mean 'gate'"),
    ],
)
def test_settings_that_do_not_exist(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        XattnConfig.parse(settings, "config")


@pytest.mark.parametrize(
    ("layers", "says"),
    [([0, 7], "layer 7 does not exist"), ("spread:0", "between 1 and"), ("last:9", "between 1")],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    layers: Any, says: str, tmp_path: Path
) -> None:
    base, tower = save_base(tmp_path / "base", "llama"), tiny_clip_dir(tmp_path / "tower")
    with pytest.raises(UsageError, match=says):
        create_graft(str(base), str(tower), XattnConfig(layers=layers), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    base, tower = save_base(tmp_path / "base", "llama"), tiny_clip_dir(tmp_path / "tower")
    for marker in (True, False):
        run = tmp_path / f"run-{marker}"
        create_graft(str(base), str(tower), XattnConfig(layers=[1], marker=marker), run)
        model = perturb(GraftedModel.from_pretrained(run))
        mean = model.base.get_input_embeddings().weight.mean(0)
        near = distance(model.workflow().graft.marker.vector, mean) < 1e-6  # type: ignore[arg-type]
        assert near != marker  # noise is on what is trained
        model.save_pretrained(tmp_path / "saved")
        again = GraftedModel.from_pretrained(tmp_path / "saved")
        names = {name for name in again.workflow().state_dict() if name.startswith("graft.")}
        assert {"graft.marker.vector", "graft.blocks.1.attention.gate"} < names
        inputs = batch([row("ttittt", width=16)])
        assert torch.equal(logits_of(model, inputs), logits_of(again, inputs))


def test_it_is_no_plain_decoder_and_keeps_its_base_and_its_blocks() -> None:
    method = get_method("xattn")
    assert method.as_decoder is not None
    for active in (True, False):
        with pytest.raises(UsageError, match="beside the sequence"):
            method.as_decoder(XattnConfig(), active)
    with pytest.raises(ValueError, match="keeps its base frozen"):
        method.stage().check_switches(["projector", "base"])


@torch.no_grad()
def test_a_marker_that_was_cut_off_takes_its_image_along() -> None:
    """The next image of the row is the second one again, whatever the slot still holds."""
    model, inputs = made(layers=[0, 2]), batch([row("titttitt")])
    cache = model(**{n: t if n == "image_features" else t[:, :6] for n, t in inputs.items()},
                  use_cache=True).past_key_values  # fmt: skip
    slot = cache.layers[model.anatomy.num_layers + 1]
    assert slot.owner.tolist() == [[1] * 4 + [2] * 4]
    cache.crop(-2)
    assert slot.get_seq_length() == 8
    text = {"input_ids": inputs["input_ids"][:, 4:5], "past_key_values": cache}
    only = batch([row("titttitt")])
    first = {n: t[:1] if n == "image_features" else t[:, :5] for n, t in only.items()}
    assert distance(model(**text).logits, logits_of(model, first)[:, 4:]) < 1e-5
    other = inputs["image_features"][1:] + 1.0
    step = {"input_ids": inputs["input_ids"][:, 5:], "past_key_values": cache}
    step |= {"mm_token_type_ids": inputs["mm_token_type_ids"][:, 5:], "image_features": other}
    found = model(**step).logits
    assert slot.owner.tolist() == [[1] * 4 + [0] * 4 + [2] * 4]
    whole = {**inputs, "image_features": torch.cat([inputs["image_features"][:1], other])}
    assert distance(found, logits_of(model, whole)[:, 5:]) < 1e-5


@pytest.mark.parametrize("arch", VARIANTS)
def test_other_forms_of_the_classes(arch: str) -> None:
    """Windows in other places, a projected embedding: keys are as wide as what the base embeds."""
    model, inputs = perturb(graft_on(arch, CONFIGS["xattn"])), batch(rows(*WORDS), "left")
    inputs["image_features"] = inputs["image_features"][..., : model.anatomy.embedding_size]
    assert worst(model, inputs) < 1e-5


def test_packed_rows_read_their_own_images() -> None:
    """In packed sequences the images of each row are numbered through, and kept apart."""
    model, one, two = made(layers=[0, 2]), row("ittti"), row("ttitt", seed=4)
    ids = torch.cat([one.ids, two.ids, one.ids[:2]])[None]
    kinds = F.pad(torch.cat([one.kinds, two.kinds]), (0, 2))[None]
    segments = torch.tensor([[1] * 5 + [2] * 5 + [0] * 2])
    features = torch.cat([one.features, two.features])
    found = logits_of(
        model,
        {"input_ids": ids, "mm_token_type_ids": kinds, "segments": segments,
         "image_features": features},
    )[0]  # fmt: skip
    assert distance(found[:5], logits_of(model, batch([one]))[0]) < 1e-5
    assert distance(found[5:10], logits_of(model, batch([two]))[0]) < 1e-5
