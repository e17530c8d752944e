"""The adapter alone in a new folder: what a push would send, and nothing of the run's work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmgraft import GraftedModel
from mmgraft.export.folder import sizes_in
from mmgraft.export.graft import export_graft
from mmgraft.hub.card import MARKER
from mmgraft.model.files.graft_file import BaseReference, GraftFile
from mmgraft.model.files.save import save_graft
from mmgraft.vision.spec import VisionSpec
from tiny_exports import change_record, make_graft


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = make_graft(tmp_path)
    (run / "recipe.yaml").write_text("name: mine\n")
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "checkpoints" / "one").mkdir(parents=True)
    (run / "checkpoints" / "one" / "optimizer.pt").write_text("large")
    return run


def test_only_the_graft_goes_along(tmp_path: Path, run: Path) -> None:
    made = export_graft(run, tmp_path / "out")
    assert set(made.files) == {
        "README.md", "config.json", "graft.safetensors", "graft_config.json", "recipe.yaml",
    }  # fmt: skip
    assert made.files == sizes_in(tmp_path / "out")
    weights = (tmp_path / "out" / "graft.safetensors").read_bytes()
    assert weights == (run / "graft.safetensors").read_bytes()
    assert "name: mine" in (tmp_path / "out" / "README.md").read_text()


def test_it_loads_from_any_folder(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base and a tower that were named from the folder of the day are named by their paths."""
    record = GraftFile.read(run)
    base = record.base.model_copy(update={"id": "llama"})
    change_record(run, base=base, vision=VisionSpec(id="clip"))
    monkeypatch.chdir(tmp_path)
    made = export_graft(run, tmp_path / "out")
    monkeypatch.chdir("/")
    model = GraftedModel.from_pretrained(tmp_path / "out")
    assert model.names == ["mm"]
    assert GraftFile.read(tmp_path / "out").base.id == str(tmp_path / "llama")
    assert sum("of this machine" in note for note in made.notes) == 2


def test_hub_ids_stay(tmp_path: Path, run: Path) -> None:
    base = BaseReference(id="acme/tiny", revision="abc")
    vision = VisionSpec(id="acme/eye", revision="def")
    change_record(run, base=base, vision=vision)
    made = export_graft(run, tmp_path / "out")
    record = GraftFile.read(tmp_path / "out")
    assert (record.base, record.vision, made.notes) == (base, vision, [])


def test_a_trained_base_goes_along(tmp_path: Path, run: Path) -> None:
    model = GraftedModel.from_pretrained(run)
    model.base.model.layers[0].mlp.up_proj.weight.data += 0.5
    model.workflow().record.base_trained = True
    save_graft(model, run)
    made = export_graft(run, tmp_path / "out")
    assert "base/model.safetensors" in made.files
    assert "base/tokenizer.json" in made.files
    assert any("goes along in ./base" in note for note in made.notes)
    loaded = GraftedModel.from_pretrained(tmp_path / "out")
    trained = model.base.model.layers[0].mlp.up_proj.weight
    assert torch.equal(loaded.base.model.layers[0].mlp.up_proj.weight, trained)


def test_a_readme_of_ones_own_is_kept(tmp_path: Path, run: Path) -> None:
    (run / "README.md").write_text("# Mine\n")
    export_graft(run, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"
    (run / "README.md").write_text(f"# Theirs\n{MARKER}\n")
    export_graft(run, tmp_path / "second")
    assert "# second" in (tmp_path / "second" / "README.md").read_text()


def test_a_dry_run_lists_and_writes_nothing(tmp_path: Path, run: Path) -> None:
    made = export_graft(run, tmp_path / "out", dry_run=True)
    assert not made.written
    assert not (tmp_path / "out").exists()
    assert made.files["graft.safetensors"] == (run / "graft.safetensors").stat().st_size
