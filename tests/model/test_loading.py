"""Load what was saved bit for bit; refuse what does not belong together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grafting import CONFIGS, batch, every_architecture, every_method, logits_of, perturb, rows
from mmgraft import GraftedModel, IAAConfig, WingsConfig
from mmgraft.errors import UsageError
from mmgraft.model.files.create import create_graft
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.save import save_graft
from tiny import save_base, tiny_clip_dir, tiny_siglip_dir

TOWER_WIDTH = 16


def inputs_for(model: GraftedModel) -> dict[str, Tensor]:
    inputs = batch(rows("ttiiiittttt", "iiiitttiiiit"), "left")
    return {**inputs, "image_features": inputs["image_features"][..., :TOWER_WIDTH]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a tower."""
    folder = tmp_path_factory.mktemp("parts")
    save_base(folder / "base", "llama")
    tiny_clip_dir(folder / "tower")
    return folder


@pytest.fixture
def graft(parts: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a graft's folder on the shared base."""

    def make(config: Any = CONFIGS["iaa-c"], name: str = "graft", **options: Any) -> Path:
        folder = tmp_path / name
        base = options.pop("base", parts / "base")
        create_graft(
            str(base), str(options.pop("tower", parts / "tower")), config, folder, **options
        )
        return folder

    return make


def same(one: GraftedModel, other: GraftedModel) -> None:
    mine, theirs = one.workflows.state_dict(), other.workflows.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    inputs = inputs_for(one)
    assert torch.equal(logits_of(one, inputs), logits_of(other, inputs))


def round_trip(folder: Path, copy: Path, **options: Any) -> tuple[GraftedModel, GraftedModel]:
    model = perturb(GraftedModel.from_pretrained(folder))
    save_graft(model, copy, **options)
    loaded = GraftedModel.from_pretrained(copy)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    same(model, loaded)
    return model, loaded


@every_architecture
def test_every_architecture_comes_back_bit_for_bit(arch: str, tmp_path: Path) -> None:
    """Both methods that own modules, on one base."""
    save_base(tmp_path / "base", arch)
    tiny_clip_dir(tmp_path / "tower")
    for method in ("iaa-a", "wings"):
        config = CONFIGS[method]
        create_graft(str(tmp_path / "base"), str(tmp_path / "tower"), config, tmp_path / method)
        round_trip(tmp_path / method, tmp_path / f"{method}-copy")


@every_method
def test_every_method_comes_back_bit_for_bit(method: str, graft, tmp_path: Path) -> None:
    model, loaded = round_trip(graft(CONFIGS[method]), tmp_path / "copy")
    record = model.workflow().record.model_copy(update={"state": model.workflow().graft.state()})
    seen = loaded.workflow().record.vision_features
    assert loaded.workflow().record == record.model_copy(update={"vision_features": seen})
    loaded.save_pretrained(tmp_path / "again")
    one, other = (tmp_path / name for name in ("copy", "again"))
    texts = [(folder / "graft_config.json").read_text() for folder in (one, other)]
    assert texts[0] == texts[1]
    saved, again = (load_file(folder / "graft.safetensors") for folder in (one, other))
    assert saved.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved.items())


def test_a_graft_in_shards(graft, tmp_path: Path) -> None:
    round_trip(graft(), tmp_path / "copy", max_shard_size="40KB")
    assert len(list((tmp_path / "copy").glob("graft-*.safetensors"))) > 2
    assert not (tmp_path / "copy" / "graft.safetensors").exists()


@pytest.mark.parametrize("untie", [False, True])
def test_a_tied_pair_is_saved_once_and_is_tied_again(untie: bool, tmp_path: Path) -> None:
    save_base(tmp_path / "base", "qwen2")
    tiny_clip_dir(tmp_path / "tower")
    config = IAAConfig(layers=[1], untie=untie)
    create_graft(str(tmp_path / "base"), str(tmp_path / "tower"), config, tmp_path / "graft")
    _, loaded = round_trip(tmp_path / "graft", tmp_path / "copy")
    names = set(load_file(tmp_path / "copy" / "graft.safetensors"))
    assert "graft.embedding.weight" in names
    assert ("graft.head.weight" in names) == untie
    own = loaded.workflow().graft
    assert (own.head.weight is own.embedding.weight) == (not untie)


@pytest.mark.parametrize("state", [{"learners": ["visual"]}, {"active": False}])
def test_what_a_stage_runs_is_what_comes_back(state: dict, graft, tmp_path: Path) -> None:
    model = perturb(GraftedModel.from_pretrained(graft(WingsConfig(rank=4))))
    whole = logits_of(model, inputs_for(model))
    model.workflow().graft.set_state(state)
    save_graft(model, tmp_path / "stage")
    loaded = GraftedModel.from_pretrained(tmp_path / "stage")
    assert (
        loaded.workflow().graft.state()
        == {"active": True, "learners": ["visual", "textual"]} | state
    )
    same(model, loaded)
    assert not torch.equal(logits_of(loaded, inputs_for(loaded)), whole)


def test_dtypes(graft) -> None:
    folder = graft()
    for options, base, rest in [
        ({}, torch.float32, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
        ({"dtype": "bfloat16", "graft_dtype": torch.float32}, torch.bfloat16, torch.float32),
    ]:
        model = GraftedModel.from_pretrained(folder, **options)
        assert {p.dtype for p in model.base.parameters()} == {base}
        assert {p.dtype for p in model.workflows.parameters()} == {rest}
        assert model.vision_tower.dtype == base
        buffers = dict(model.base.named_buffers())
        assert all(b.dtype == torch.float32 for n, b in buffers.items() if n.endswith("inv_freq"))


def config_of(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "graft_config.json"
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return damage


def weights_of(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "graft.safetensors"
        tensors = {k: v.clone() for k, v in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)

    return damage


def cut(folder: Path) -> None:
    file = folder / "graft.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


NORM, FIRST = "graft.norm.weight", "projector.mlp.0.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "graft_config.json").unlink(), "so it is no graft"),
    "not json": (lambda f: (f / "graft_config.json").write_text("{"), "corrupt"),
    "a list": (lambda f: (f / "graft_config.json").write_text("[]"), "corrupt"),
    "newer": (config_of(lambda d: d.update(schema_version=2)), "pip install -U mmgraft"),
    "unknown key": (config_of(lambda d: d.update(colour=1)), "colour"),
    "unknown setting": (config_of(lambda d: d["config"].update(colour=1)), "colour"),
    "unknown method": (config_of(lambda d: d.update(method="eyes")), "eyes"),
    "unknown state": (config_of(lambda d: d.update(state={"colour": 1})), "colour"),
    "missing key": (config_of(lambda d: d.pop("base")), "base"),
    "no weights": (lambda f: (f / "graft.safetensors").unlink(), r"lacks graft\.safetensors"),
    "cut weights": (cut, "corrupt"),
    "a tensor less": (weights_of(lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "a tensor more": (weights_of(lambda t: t.update(eye=t[NORM].clone())), "eye is unknown"),
    "no projector": (weights_of(lambda t: t.pop(FIRST)), f"{FIRST} is missing"),
    "another shape": (weights_of(lambda t: t.update({NORM: t[NORM][:8].clone()})), NORM),
    "another layer": (config_of(lambda d: d["config"].update(layers=[0, 9])), "9"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_graft_is_refused_and_says_what_is_wrong(damage: str, graft) -> None:
    folder = graft()
    act, says = DAMAGES[damage]
    act(folder)
    with pytest.raises(UsageError, match=says):
        GraftedModel.from_pretrained(folder)


def test_a_place_without_a_graft(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mmgraft graft BASE"):
        GraftedModel.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="neither a folder nor a Hub id"):
        GraftedModel.from_pretrained(tmp_path / "nothing")


EMBEDDING = "model.embed_tokens.weight"


def tuned(folder: Path, copy: Path, name: str, at: int) -> Path:
    """The base with one number changed, as a fine-tune with the same config has it."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name].view(-1)[at] += 1.0
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_another_base_is_refused_by_what_differs(graft, parts: Path, tmp_path: Path) -> None:
    folder = graft()
    name = "model.layers.2.mlp.up_proj.weight"
    other = tuned(parts / "base", tmp_path / "tuned", name, 7)
    with pytest.raises(UsageError, match=name):
        GraftedModel.from_pretrained(folder, base=str(other))
    loaded = GraftedModel.from_pretrained(folder, base=str(other), verify="off")
    assert (
        loaded.base.get_parameter(name).view(-1)[7]
        != GraftedModel.from_pretrained(folder).base.get_parameter(name).view(-1)[7]
    )
    config = json.loads((parts / "base" / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    shutil.copytree(parts / "base", tmp_path / "eps")
    (tmp_path / "eps" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="rms_norm_eps"):
        GraftedModel.from_pretrained(folder, base=str(tmp_path / "eps"))
    save_base(tmp_path / "mistral", "mistral")
    with pytest.raises(UsageError, match="is not the base"):
        GraftedModel.from_pretrained(folder, base=str(tmp_path / "mistral"))


def test_a_base_elsewhere_is_as_good(graft, parts: Path, tmp_path: Path) -> None:
    folder = graft()
    shutil.copytree(parts / "base", tmp_path / "moved")
    same(
        GraftedModel.from_pretrained(folder),
        GraftedModel.from_pretrained(folder, base=str(tmp_path / "moved")),
    )


def test_a_full_check_sees_the_middle_of_a_large_tensor(graft, parts, tmp_path: Path) -> None:
    """Read the edges alone of a tensor over 32 KiB in the fast check."""
    quick, thorough = graft(), graft(name="thorough", full_fingerprint=True)
    middle = 320 * 32 // 2
    other = str(tuned(parts / "base", tmp_path / "tuned", EMBEDDING, middle))
    GraftedModel.from_pretrained(thorough, base=other)
    with pytest.raises(UsageError, match=EMBEDDING):
        GraftedModel.from_pretrained(thorough, base=other, verify="full")
    GraftedModel.from_pretrained(thorough, verify="full")
    with pytest.raises(UsageError, match="nothing to compare with"):
        GraftedModel.from_pretrained(quick, verify="full")


def test_a_second_workflow_runs_as_it_does_alone(graft) -> None:
    first = perturb(GraftedModel.from_pretrained(graft(CONFIGS["iaa-c"], "first")))
    folder = graft(CONFIGS["wings"], "second")
    second = perturb(GraftedModel.from_pretrained(folder), seed=3)
    save_graft(second, folder)
    alone = [logits_of(m, inputs_for(m)) for m in (first, second)]
    first.add_workflow("grounding", folder)
    assert first.names == ["mm", "grounding"]
    inputs = inputs_for(first)
    assert torch.equal(logits_of(first, inputs), alone[0])
    assert torch.equal(logits_of(first, inputs, workflow="grounding"), alone[1])
    save_graft(first, folder.parent / "third", "grounding")
    record = GraftFile.read(folder.parent / "third")
    assert (record.workflow, record.method) == ("grounding", "wings")


def test_workflows_of_another_base_or_tower_are_refused(graft, parts, tmp_path: Path) -> None:
    model = GraftedModel.from_pretrained(graft())
    with pytest.raises(UsageError, match="'mm' already"):
        model.add_workflow("mm", graft(name="twin"))
    name = "model.norm.weight"
    base = tuned(parts / "base", tmp_path / "tuned", name, 0)
    with pytest.raises(UsageError, match=name):
        model.add_workflow("grounding", graft(name="other-base", base=base))
    tiny_siglip_dir(tmp_path / "siglip")
    with pytest.raises(UsageError, match="share a tower"):
        model.add_workflow("grounding", graft(name="other-tower", tower=tmp_path / "siglip"))
    with pytest.raises(UsageError, match="cannot name a workflow"):
        model.add_workflow("text", graft(name="text"))
    assert model.names == ["mm"]
