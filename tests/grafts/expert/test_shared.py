"""Positions that an image's vectors share: the reference, caches, masks, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from decoding import in_chunks
from expert_weights import by_hand
from grafting import (
    CONFIGS,
    batch,
    distance,
    graft_on,
    logits_of,
    own,
    perturb,
    plain,
    rows,
    text_labels,
    together,
)
from mmgraft import ExpertConfig, GraftedModel
from mmgraft.errors import UsageError
from mmgraft.model.files.create import create_graft
from mmgraft.training.run import plan_training
from tiny import save_base, tiny_clip_dir
from tiny_runs import make_parts, make_run, write_recipe

SHARED = ExpertConfig(rank=3, image_positions="shared")
WORD = "tttiiiittiiiiiiiittttt"  # two images side by side are two positions
WORDS = ("tiiiittttt", "ttttttttiiiitttt", "iiiitiiiitt", "ttttttttttttt")
NUMBERED = [
    "llama",
    "gemma3",
    "gpt2",
    "opt",
    "phi",
    "falcon",
    "smollm3",
    "gpt_neox",
    "gpt_oss",
    "cohere",
]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def shared(arch: str = "llama", seed: int = 1, **changes: Any) -> GraftedModel:
    return perturb(graft_on(arch, SHARED, **changes), seed=seed)


@torch.no_grad()
def test_it_computes_what_the_reference_does() -> None:
    model, inputs = shared(), batch(rows(WORD))
    expected = by_hand(model, inputs, shared=True)
    assert distance(logits_of(model, inputs)[0], expected) < 1e-4 * expected.abs().max()
    assert distance(by_hand(model, inputs), expected) > 1e-2


def test_loss_and_gradients_are_the_references() -> None:
    model, inputs = shared(), batch(rows(WORD))
    names = model.set_trainable(["projector", "graft"])
    model.train()
    model.gradient_checkpointing_enable()
    model(**inputs, labels=text_labels(inputs)).loss.backward()
    parameters = dict(model.named_parameters())
    found = {name: parameters[name].grad for name in names}
    model.zero_grad()
    logits, labels = by_hand(model, inputs, shared=True), text_labels(inputs)[0, 1:]
    torch.nn.functional.cross_entropy(logits[:-1], labels).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, parameters[name].grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("arch", NUMBERED)
@torch.no_grad()
def test_rows_and_caches_agree_with_and_without_a_mask(arch: str) -> None:
    """Trap: transformers takes a repeated position for the beginning of a packed row."""
    model, one = shared(arch), batch(rows(WORD))
    whole = logits_of(model, one)
    without = {name: tensor for name, tensor in one.items() if name != "attention_mask"}
    assert torch.equal(logits_of(model, without), whole)
    each = perturb(graft_on(arch, SHARED.model_copy(update={"image_positions": "each"})))
    assert distance(logits_of(each, one), whole) > 1e-3
    assert distance(in_chunks(model, one, (7, 8, 17, 18, 19, 22)), whole) < 2e-5
    for side in ("left", "right"):
        several = batch(rows(*WORDS), side)
        mine = own(logits_of(model, several, workflow="mm"), several)
        for row, found in zip(rows(*WORDS), mine, strict=True):
            assert distance(found, logits_of(model, batch([row]), workflow="mm")[0]) < 2e-5


@torch.no_grad()
def test_text_is_the_bases_and_text_before_an_image_too() -> None:
    model, inputs = shared(), batch(rows(*WORDS), "left")
    found, mask = logits_of(model, inputs), inputs["attention_mask"]
    text = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    text["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    base = logits_of(plain("llama"), text)
    assert torch.equal(found[3], base[3])
    assert torch.equal(found[1, :8], base[1, :8])


def by_steps(model: GraftedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Greedy tokens of full forwards without a cache, row by row."""
    made = []
    for number in range(len(inputs["input_ids"])):
        real = inputs["attention_mask"][number].bool()
        ids, kinds = (inputs[n][number, real] for n in ("input_ids", "mm_token_type_ids"))
        before = int(inputs["mm_token_type_ids"][:number].sum()) // 4
        features = inputs["image_features"][before : before + int(kinds.sum()) // 4]
        for _ in range(4):
            given = {"input_ids": ids[None], "mm_token_type_ids": kinds[None]}
            logits = logits_of(model, {**given, "image_features": features})[0, -1]
            logits[model.generation_config.eos_token_id] = -torch.inf
            ids, kinds = torch.cat([ids, logits.argmax()[None]]), torch.cat([kinds, kinds[:1] * 0])
        made.append(ids[-4:])
    return torch.stack(made)


MODES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "without a cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "beams of one answer": {"num_beams": 3},
    "looked up": {"prompt_lookup_num_tokens": 3},
    "drafted": {"assistant_model": True},
}


@pytest.fixture
def assistants(caplog: pytest.LogCaptureFixture) -> None:
    """Lets transformers call its own assistant in a way that it calls deprecated."""
    caplog.set_level(logging.ERROR, logger="transformers.generation.utils")


@pytest.mark.usefixtures("assistants")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_every_mode_goes_on_from_the_rows_positions(mode: str, arch: str) -> None:
    model, options = shared(arch), dict(MODES[mode])
    alone = mode in ("looked up", "drafted")
    inputs = batch(rows(*WORDS[1 : 2 if alone else 3]), "left")
    if "assistant_model" in options:  # mostly right, so that caches are cut and go on
        options["assistant_model"] = shared(arch)
        for parameter in options["assistant_model"].workflows.parameters():
            parameter.data.mul_(1.01)
    made = model.generate(**inputs, **GREEDY, **options)[:, -4:]
    wanted = by_steps(model, inputs)
    if mode.startswith("beams"):
        wanted = model.generate(**inputs, **GREEDY, **options, use_cache=False)[:, -4:]
    assert torch.equal(made, wanted)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_text_gets_an_image_and_another_one(kind: str) -> None:
    """A dialogue in four turns, in rows of two lengths, against all of it at once."""
    model = shared()
    config = model.base.config
    cache: Any = (
        DynamicCache(config=config)
        if kind == "dynamic"
        else StaticCache(config=config, max_cache_len=60)
    )
    turns = [("ttttttt", "ttttttttttt"), ("iiiitt", "tiiiit"), ("ttt", "ttt"), ("tiiiit", "iiiitt")]
    whole: dict[str, Tensor] = {}
    images: list[Tensor] = []  # of each turn (rows, P, v)
    for number, words in enumerate(turns):
        new = batch(rows(*words, seed=number), "left")
        if "image_features" in new:
            images.append(new.pop("image_features"))
        new.setdefault("mm_token_type_ids", torch.zeros_like(new["input_ids"]))
        whole = {n: torch.cat([whole[n], new[n]], 1) if whole else new[n] for n in new}
        shown = {"image_features": torch.stack(images, 1).flatten(0, 1)} if images else {}
        said = model.generate(**whole, **shown, past_key_values=cache, **GREEDY)
        wanted = model.generate(**whole, **shown, **GREEDY)
        assert torch.equal(said, wanted), number
        fills = {"attention_mask": 1, "mm_token_type_ids": 0}
        whole = {"input_ids": said} | {
            name: torch.nn.functional.pad(whole[name], (0, 4), value=fill)
            for name, fill in fills.items()
        }


@torch.no_grad()
def test_beside_other_workflows_each_row_keeps_its_own_positions() -> None:
    made = {
        "mm": shared(),
        "each": perturb(graft_on("llama", CONFIGS["expert"], workflow="each"), seed=5),
        "row": perturb(graft_on("llama", CONFIGS["lora"], workflow="row"), seed=6),
    }
    model, names = together(*made.values()), ["mm", "each", "row", "text"]
    inputs = batch(rows(*WORDS), "left")
    found = own(logits_of(model, inputs, workflow=names), inputs)
    steps = in_chunks(model, inputs, (14, 15, 16), workflow=names)
    later = own(steps, inputs)
    for number, (row, name) in enumerate(zip(rows(*WORDS), names, strict=True)):
        one = plain("llama") if name == "text" else made[name]
        wanted = logits_of(one, batch([row]), **({} if name == "text" else {"workflow": name}))[0]
        assert distance(found[number], wanted) < 1e-5, name
        assert distance(later[number], wanted) < 1e-5, name


@torch.no_grad()
def test_out_of_the_path_nothing_is_shared() -> None:
    model, inputs = shared(), batch(rows(WORD))
    model.workflow().graft.set_state({"active": False})
    other = graft_on("llama", CONFIGS["llava"])
    other.workflow().projector.load_state_dict(model.workflow().projector.state_dict())
    assert torch.equal(logits_of(model, inputs), logits_of(other, inputs))


@pytest.mark.parametrize("arch", ["bloom", "falcon_alibi"])
def test_bases_that_take_no_positions_are_refused(arch: str, tmp_path: Path) -> None:
    base, tower = save_base(tmp_path / "base", arch), tiny_clip_dir(tmp_path / "tower")
    with pytest.raises(UsageError, match=r"image_positions: shared .* Choose each"):
        create_graft(str(base), str(tower), SHARED, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert graft_on(arch, ExpertConfig(rank=2)) is not None


def test_flash_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graft = shared().workflow().graft
    with pytest.raises(UsageError, match=r"flash_attention_2 reads .* sdpa"):
        graft.check_attention("flash_attention_2")
    graft.check_attention("sdpa")
    graft_on("llama", CONFIGS["expert"]).workflow().graft.check_attention("flash_attention_2")


def test_packing_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "parts")
    run = make_run(parts, tmp_path / "run", "expert", image_positions="shared")
    stage = {"name": "tune", "train": ["projector", "graft"], "max_steps": 2, "lr": 1e-3}
    write_recipe(run, parts, "expert", [{**stage, "packing": True, "max_length": 64}])
    before = sorted(run.rglob("*"))
    with pytest.raises(UsageError, match="stage 'tune': this expert cannot hold several rows"):
        plan_training(run, device="cpu")
    assert sorted(run.rglob("*")) == before
    model, inputs = shared(), batch(rows("ttiiiitt"))
    inputs["segments"] = inputs.pop("attention_mask")
    with pytest.raises(UsageError, match="this expert cannot hold several rows in one sequence"):
        model(**inputs)
    model.workflow().graft.set_state({"active": False})
    assert torch.isfinite(logits_of(model, inputs)).all()
