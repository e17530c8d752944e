"""One folder with base, tower and graft loads by itself, wherever it lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from mmgraft import GraftedModel
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.export import graft as full
from mmgraft.export.folder import sizes_in
from mmgraft.export.graft import export_full
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import load_processor
from mmgraft.model.files.save import save_graft
from mmgraft.vision.spec import VisionSpec
from tiny import save_base
from tiny_exports import conversations, make_base, make_graft, make_tower, save_pictures
from tiny_towers import save_tower, tiny_tower


@torch.no_grad()
def logits(folder: Path, pictures: list[str]) -> Tensor:
    model = GraftedModel.from_pretrained(folder)
    tower = model.vision_tower
    assert tower is not None
    record = GraftFile.read(folder)
    tokenizer = folder / record.base.id
    processor = load_processor(record, tokenizer, tower)
    return model(**processor(conversations(pictures))).logits


def moved_away(tmp_path: Path, *names: str) -> None:
    """Everything that the graft came from is gone."""
    for name in names:
        shutil.rmtree(tmp_path / name)


@pytest.mark.parametrize("method", ["iaa", "wings", "llava", "lora", "expert", "xattn"])
def test_it_loads_alone_and_elsewhere(tmp_path: Path, method: str) -> None:
    pictures = save_pictures(tmp_path)
    run = make_graft(tmp_path, "qwen3", method=method)
    before = logits(run, pictures)
    made = export_full(run, tmp_path / "out")
    moved_away(tmp_path, "run", "qwen3", "clip")
    elsewhere = tmp_path / "else" / "where"
    elsewhere.parent.mkdir()
    made.folder.rename(elsewhere)
    assert torch.equal(logits(elsewhere, pictures), before)
    record = GraftFile.read(elsewhere)
    assert record.base.id == "./base"
    assert record.base.revision is None
    assert record.vision.id == "./vision"
    assert str(tmp_path) not in (elsewhere / "graft_config.json").read_text()
    assert made.files == sizes_in(elsewhere)


def test_an_untrained_base_is_copied_as_it_is(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", max_shard_size="100KB")
    (base / "LICENSE").write_text("free")
    (base / "optimizer.pt").write_text("large")
    (base / "checkpoint-1").mkdir()
    (base / "old.safetensors").write_text("no weights in use")
    run = make_graft(tmp_path, base=base)
    made = export_full(run, tmp_path / "out")
    kept = {path.name for path in base.iterdir()} - {
        "optimizer.pt",
        "checkpoint-1",
        "old.safetensors",
    }
    copied = tmp_path / "out" / "base"
    assert {path.name for path in copied.iterdir()} == kept
    assert len([name for name in kept if name.endswith(".safetensors")]) > 1
    for name in kept - {"generation_config.json"}:
        assert (copied / name).read_bytes() == (base / name).read_bytes()
        assert not (copied / name).is_symlink()
    assert any("one workflow, mm" in note for note in made.notes)


@pytest.mark.parametrize("written", [True, False])
def test_what_loads_the_copied_base_ends_answers_as_the_template_does(
    tmp_path: Path, written: bool
) -> None:
    base = save_base(tmp_path / "base", "llama")
    settings = base / "generation_config.json"
    config = GenerationConfig(eos_token_id=2, temperature=0.6, do_sample=True)
    config.save_pretrained(base)
    if not written:
        settings.unlink()
    run = make_graft(tmp_path, base=base)
    export_full(run, tmp_path / "out")
    model = GraftedModel.from_pretrained(tmp_path / "out")
    copied = GenerationConfig.from_pretrained(tmp_path / "out" / "base")
    ends = load_processor(GraftFile.read(run), base, None).answers.with_ends(
        2 if written else model.base.config.eos_token_id
    )
    assert copied.eos_token_id == ends
    assert isinstance(ends, list)
    if written:
        assert (copied.temperature, copied.do_sample) == (0.6, True)
        assert GenerationConfig.from_pretrained(base).eos_token_id == 2


def test_a_trained_base_goes_along_as_it_was_trained(tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path)
    run = make_graft(tmp_path, method="llava")
    model = GraftedModel.from_pretrained(run)
    model.base.model.layers[0].mlp.up_proj.weight.data += 0.5
    model.workflow().record.base_trained = True
    save_graft(model, run)
    before = logits(run, pictures)
    made = export_full(run, tmp_path / "out")
    moved_away(tmp_path, "run", "llama", "clip")
    assert torch.equal(logits(tmp_path / "out", pictures), before)
    assert any("its base was trained" in note for note in made.notes)


def test_a_second_workflow_is_known_by_its_tower(tmp_path: Path) -> None:
    """Every such folder calls its tower ./vision, whatever lies there."""
    export_full(make_graft(tmp_path), tmp_path / "out")
    export_full(make_graft(tmp_path, name="other", layers=[1]), tmp_path / "second")
    export_full(make_graft(tmp_path, name="blind", tower="siglip"), tmp_path / "third")
    model = GraftedModel.from_pretrained(tmp_path / "out")
    model.add_workflow("grounding", tmp_path / "second")
    assert model.names == ["mm", "grounding"]
    with pytest.raises(UsageError, match="workflows of one model share a tower"):
        model.add_workflow("more", tmp_path / "third")


@pytest.mark.parametrize("name", ["siglip", "dinov3", "convnext"])
def test_towers_keep_their_pixels(tmp_path: Path, name: str) -> None:
    """DINOv3's processor has no PIL form: its settings are copied."""
    pictures = save_pictures(tmp_path)
    save_tower(tmp_path / "tower", name)
    run = make_graft(tmp_path, tower=VisionSpec(id=str(tmp_path / "tower")), method="llava")
    before = logits(run, pictures)
    export_full(run, tmp_path / "out")
    moved_away(tmp_path, "tower")
    assert torch.equal(logits(tmp_path / "out", pictures), before)


def test_options_of_a_tower_are_kept(tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path)
    options = {"image_size": 32}  # means and deviations come from its processor
    spec = VisionSpec(id=str(make_tower(tmp_path, "clip")), options=options)
    run = make_graft(tmp_path, tower=spec, method="llava")
    before = logits(run, pictures)
    export_full(run, tmp_path / "out")
    moved_away(tmp_path, "clip")
    assert torch.equal(logits(tmp_path / "out", pictures), before)


def test_a_tower_of_a_package_stays_in_it(tmp_path: Path) -> None:
    run = make_graft(tmp_path, tower=tiny_tower().spec, method="llava")
    made = export_full(run, tmp_path / "out")
    assert any("tiny comes with a package" in note for note in made.notes)
    assert GraftFile.read(tmp_path / "out").vision == tiny_tower().spec
    assert not (tmp_path / "out" / "vision").exists()
    GraftedModel.from_pretrained(tmp_path / "out")


def test_a_tower_that_saves_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_graft(tmp_path)
    other = make_tower(tmp_path / "other", "siglip")
    load = full.load_tower
    places = iter([None, str(other)])

    def confused(spec: VisionSpec) -> object:
        place = next(places)
        return load(spec if place is None else VisionSpec(id=place))

    monkeypatch.setattr(full, "load_tower", confused)
    with pytest.raises(UsageError, match="saves something else"):
        export_full(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_is_not_bundled(tmp_path: Path) -> None:
    run = make_graft(tmp_path)
    save_base(tmp_path / "llama", "llama", seed=9)
    with pytest.raises(UsageError, match="is not the base that this graft was made for"):
        export_full(run, tmp_path / "out")
    moved = make_base(tmp_path / "moved", "llama")
    export_full(run, tmp_path / "out", base=str(moved))
    GraftedModel.from_pretrained(tmp_path / "out")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = make_graft(tmp_path), tmp_path / "out"
    export_full(run, out)
    before = sizes_in(out)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(full, "write_files", no_space)
    with pytest.raises(MMGraftError, match="No space left"):
        export_full(run, out)
    assert sizes_in(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "llama", "out", "run"]


def test_a_dry_run_lists_and_writes_nothing(tmp_path: Path) -> None:
    run = make_graft(tmp_path)
    made = export_full(run, tmp_path / "out", dry_run=True)
    assert not made.written
    assert not (tmp_path / "out").exists()
    size = (tmp_path / "llama" / "model.safetensors").stat().st_size
    assert made.files["base/model.safetensors"] == size
    assert "graft.safetensors" in made.files
