"""Importing checkpoints of the published code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hub_server import HubServer
from mmgraft import GraftedModel
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.published import importer as official
from mmgraft.published.importer import import_checkpoint
from published import published_iaa, published_wings, save_published
from tiny import save_base, tiny_clip_dir, tiny_siglip_dir


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, a Qwen2, two towers, and an IAA and a Wings checkpoint made of them."""
    root = tmp_path_factory.mktemp("made")
    save_base(root / "llama", "llama", tie_word_embeddings=False)
    save_base(root / "qwen2", "qwen2", tie_word_embeddings=False)
    clip, siglip = tiny_clip_dir(root / "clip"), tiny_siglip_dir(root / "siglip")
    iaa = published_iaa(root / "llama", clip, [0, 2])
    save_published(root / "iaa", *iaa, tower=clip, shards=3)
    save_published(root / "wings", *published_wings(root / "qwen2", siglip), tower=siglip)
    return root


def logits(model: GraftedModel, workflow: str) -> torch.Tensor:
    ids = torch.arange(3, 15)[None]
    kinds = torch.zeros_like(ids)
    kinds[:, 4:8] = 1
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(
            input_ids=ids,
            mm_token_type_ids=kinds,
            pixel_values=torch.randn(1, 3, 16, 16, generator=generator),
            workflow=workflow,
            use_cache=False,
        ).logits


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_without_a_base_the_checkpoints_own_is_written(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = import_checkpoint(made / "iaa", out)
    assert report.own_base
    assert (report.base, report.difference) == (str(out / "base"), None)
    assert [graft.folder for graft in report.grafts] == [str(out), str(out / "grounding")]
    assert "not of the original LLM" in report.notes[0]
    own, original = (load_file(p / "model.safetensors") for p in (out / "base", made / "llama"))
    assert own.keys() == original.keys()
    assert all(torch.equal(own[name], original[name]) for name in own)
    record = GraftFile.read(out / "grounding")
    assert (record.workflow, record.base.id, record.base_trained) == (
        "grounding", "./../base", True,
    )  # fmt: skip
    assert record.vision.id == "./../tower"
    sizes = sum(p.stat().st_size for p in out.rglob("*.safetensors"))
    assert 0 <= sizes - report.bytes < 40_000  # headers


def test_a_moved_import_still_loads(made: Path, tmp_path: Path) -> None:
    import_checkpoint(made / "iaa", tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    model = GraftedModel.from_pretrained(tmp_path / "moved")
    model.add_workflow("grounding", tmp_path / "moved" / "grounding")
    assert not torch.equal(logits(model, "mm"), logits(model, "grounding"))
    alone = GraftedModel.from_pretrained(tmp_path / "moved" / "grounding")
    assert torch.equal(logits(alone, "grounding"), logits(model, "grounding"))


def test_an_equal_base_is_referred_to(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = import_checkpoint(made / "iaa", out, base=str(made / "llama"))
    assert not report.own_base
    assert report.base == str(made / "llama")
    assert not (out / "base").exists()
    record = GraftFile.read(out)
    assert not record.base_trained
    assert record.image_token.why != ""
    model = GraftedModel.from_pretrained(out)
    import_checkpoint(made / "iaa", tmp_path / "own")
    own = GraftedModel.from_pretrained(tmp_path / "own")
    assert torch.equal(logits(model, "mm"), logits(own, "mm"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("last", "tensor model.layers.2.self_attn.v_proj.weight has other values"),
        ("theta", "config field rope_parameters is"),
        ("vocab", "tensor lm_head.weight has shape"),
        ("type", "it is a mistral model"),
    ],
)
def test_another_base_is_named_by_its_first_difference(
    made: Path, tmp_path: Path, change: str, said: str
) -> None:
    other = tmp_path / "other"
    more = {"vocab": {"vocab_size": 160}, "theta": {"rope_parameters": {"rope_theta": 5.0}}}
    kind = "mistral" if change == "type" else "llama"
    if change == "theta":
        more["theta"]["rope_parameters"]["rope_type"] = "default"
    save_base(other, kind, tie_word_embeddings=False, **more.get(change, {}))
    if change == "last":
        from safetensors.torch import save_file

        tensors = load_file(other / "model.safetensors")
        tensors["model.layers.2.self_attn.v_proj.weight"][-1, -1] += 1e-3
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    report = import_checkpoint(made / "iaa", tmp_path / "out", base=str(other))
    assert report.own_base
    assert report.difference is not None
    assert report.difference.startswith(said)
    assert said in report.notes[0]
    assert (tmp_path / "out" / "base" / "model.safetensors").is_file()


def test_a_base_in_another_dtype_is_equal_if_it_rounds_to_the_checkpoint(
    made: Path, tmp_path: Path
) -> None:
    tensors, config = published_iaa(made / "llama", made / "clip", [0, 2], grounding=False)
    halved = {name: tensor.half() for name, tensor in tensors.items()}
    save_published(tmp_path / "half", halved, config, tower=made / "clip")
    report = import_checkpoint(tmp_path / "half", tmp_path / "a", base=str(made / "llama"))
    assert not report.own_base
    written = load_file(tmp_path / "a" / "graft.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}


@pytest.mark.parametrize("same", [True, False], ids=["same head", "another head"])
def test_a_tied_base_with_a_head_of_its_own(made: Path, tmp_path: Path, same: bool) -> None:
    save_base(tmp_path / "tied", "llama", tie_word_embeddings=True)
    tensors, config = published_iaa(tmp_path / "tied", made / "clip", [0, 2])
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if same else embedding + 1
    save_published(tmp_path / "iaa", tensors, config, tower=made / "clip")
    out = tmp_path / "out"
    report = import_checkpoint(tmp_path / "iaa", out, base=str(tmp_path / "tied"))
    assert report.own_base != same
    again = import_checkpoint(tmp_path / "iaa", out, force=True)
    assert again.own_base
    assert ("lm_head.weight" in load_file(out / "base" / "model.safetensors")) != same
    model = GraftedModel.from_pretrained(out)
    head = model.base.get_output_embeddings().weight
    assert torch.equal(head, tensors["lm_head.weight"])
    assert not torch.equal(
        model.workflow().graft.head.weight, model.workflow().graft.embedding.weight
    )


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_wings_from_a_hub_id(made: Path, tmp_path: Path, hub: HubServer, kind: str) -> None:
    name = "AIDC-AI/Wings-Qwen1_5-8B"
    tensors, config = published_wings(made / "qwen2", made / "siglip")
    folder = save_published(tmp_path / "up", tensors, config, made / "siglip", kind, shards=2)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (made / "qwen2" / file).is_file():
            shutil.copyfile(made / "qwen2" / file, folder / file)
    hub.add_model(name, folder)
    report = import_checkpoint(name, tmp_path / "out")
    local = import_checkpoint(made / "wings", tmp_path / "local")
    assert report.grafts[0].config == local.grafts[0].config
    for file in ("graft.safetensors", "tower/model.safetensors", "base/model.safetensors"):
        one, other = (load_file(tmp_path / who / file) for who in ("out", "local"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (tmp_path / "out" / "base" / "tokenizer.json").is_file()
    assert not any("tokenizer" in note for note in report.notes)
    assert any("tokenizer" in note for note in local.notes)
    assert any("official" in note for note in report.notes)
    model = GraftedModel.from_pretrained(tmp_path / "out")
    assert model.vision_tower.fingerprint() == GraftFile.read(tmp_path / "out").vision_fingerprint
    assert logits(model, "mm").isfinite().all()


def test_a_dry_run_on_the_hub_fetches_headers_only(
    made: Path, tmp_path: Path, hub: HubServer
) -> None:
    hub.add_model("me/iaa", made / "iaa")
    out = tmp_path / "out"
    report = import_checkpoint("me/iaa", out, base=str(made / "llama"), dry_run=True)
    assert not out.exists()
    cached = [path for path in (tmp_path / "hf_home").rglob("*") if path.is_file()]
    assert not any(path.name.endswith(".safetensors") for path in cached)
    assert any("compared when it is imported" in note for note in report.notes)
    written = import_checkpoint("me/iaa", out)
    assert report.bytes == written.bytes
    assert report.grafts == written.grafts


def test_a_dry_run_on_a_folder_compares_and_writes_nothing(made: Path, tmp_path: Path) -> None:
    report = import_checkpoint(
        made / "iaa", tmp_path / "out", base=str(made / "llama"), dry_run=True
    )
    assert not report.own_base
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_a_tower_names_one(made: Path, tmp_path: Path) -> None:
    folder = save_published(tmp_path / "iaa", *published_iaa(made / "llama", None, [0, 2]))
    report = import_checkpoint(folder, tmp_path / "out", tower=str(made / "clip"))
    assert report.tower == str(made / "clip")
    assert not (tmp_path / "out" / "tower").exists()
    record = GraftFile.read(tmp_path / "out")
    assert (record.vision.id, record.vision.feature_layer) == (str(made / "clip"), -2)
    assert logits(GraftedModel.from_pretrained(tmp_path / "out"), "mm").isfinite().all()
    assert import_checkpoint(folder, tmp_path / "hub").tower == "openai/tiny-clip"


def test_a_tower_that_nothing_describes_is_asked_for(made: Path, tmp_path: Path) -> None:
    folder = save_published(tmp_path / "iaa", *published_iaa(made / "llama", made / "clip", [0, 2]))
    with pytest.raises(UsageError, match="--tower"):
        import_checkpoint(folder, tmp_path / "out")
    (folder / "vision_config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UsageError, match="--tower"):
        import_checkpoint(folder, tmp_path / "out")
    (folder / "vision_config.json").unlink()
    report = import_checkpoint(folder, tmp_path / "out", tower=str(made / "clip"))
    assert report.tower == str(tmp_path / "out" / "tower")
    model = GraftedModel.from_pretrained(tmp_path / "out")
    assert model.vision_tower.image_size == (16, 16)
    local = json.loads((folder / "config.json").read_text()) | {"mm_vision_tower": "/gone/clip"}
    tensors, _ = published_iaa(made / "llama", None, [0, 2])
    with pytest.raises(UsageError, match=r"'/gone/clip'.*--tower"):
        import_checkpoint(save_published(tmp_path / "b", tensors, local), tmp_path / "c")


def test_a_folder_in_use_needs_force_and_keeps_what_is_not_replaced(
    made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / "graft-00001-of-00002.safetensors").write_bytes(b"old")
    with pytest.raises(UsageError, match="--force"):
        import_checkpoint(made / "wings", out)
    import_checkpoint(made / "wings", out, force=True)
    assert (out / "mine.txt").read_text() == "mine"
    assert not (out / "graft-00001-of-00002.safetensors").exists()
    assert GraftFile.read(out).method == "wings-official"


def test_into_the_current_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    import_checkpoint(made / "wings", ".")
    assert GraftFile.read(Path()).method == "wings-official"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_full_disk_leaves_everything_as_it_was(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    import_checkpoint(made / "wings", out)
    before = tree(tmp_path)

    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(official, "_write_graft", full)
    with pytest.raises(MMGraftError, match="No space left") as caught:
        import_checkpoint(made / "iaa", out, force=True)
    assert caught.value.exit_code == 1
    with pytest.raises(MMGraftError):
        import_checkpoint(made / "iaa", tmp_path / "new")
    assert tree(tmp_path) == before


def test_incomplete_checkpoints_are_refused(made: Path, tmp_path: Path) -> None:
    tensors, config = published_wings(made / "qwen2", made / "siglip")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    folder = save_published(tmp_path / "a", tensors, config, tower=made / "siglip")
    with pytest.raises(UsageError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        import_checkpoint(folder, tmp_path / "out")
    with pytest.raises(UsageError, match="Hub id"):
        import_checkpoint(tmp_path / "nowhere" / "at" / "all", tmp_path / "out")
    with pytest.raises(UsageError, match="no published"):
        import_checkpoint(made / "llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()
