"""Check the modules that a method may copy of a base: read from its files when it asks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmgraft.anatomy import examine_config
from mmgraft.basefiles import TensorReader, load_config, resolve
from mmgraft.grafts import registry
from mmgraft.grafts.base import BaseParts, Graft
from mmgraft.model.files import parts as parts_module
from mmgraft.model.files.create import create_graft
from mmgraft.model.files.parts import ReadParts
from mmgraft.strict import LayerChoice, StrictModel
from mmgraft.vision.spec import VisionSpec
from tiny import save_base, tiny_clip_dir, tiny_model


class CopyConfig(StrictModel):
    method: Literal["copies"] = "copies"
    layers: LayerChoice = "last:1"
    norm: bool = False


class CopyGraft(Graft):
    """A third party's method that begins with a copy of a base layer."""

    method = "copies"

    def __init__(self, config, anatomy, parts: BaseParts) -> None:
        super().__init__(config, anatomy)
        self.copied = nn.ModuleList([parts.layer(anatomy.num_layers - 1)])
        self.norm = parts.norm() if config.norm else None


def test_a_third_party_gets_the_layers_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = registry.Method("copies", "copies", "", CopyConfig, lambda: CopyGraft)
    monkeypatch.setitem(registry.METHODS.known, "copies", method)
    save_base(tmp_path / "base", "llama")
    tower = VisionSpec(id=str(tiny_clip_dir(tmp_path / "tower")))
    create_graft(str(tmp_path / "base"), tower, CopyConfig(norm=True), tmp_path / "run")
    saved = load_file(tmp_path / "run" / "graft.safetensors")
    base = tiny_model("llama").state_dict()
    own = base["model.layers.3.mlp.up_proj.weight"]
    assert torch.equal(saved["graft.copied.0.mlp.up_proj.weight"], own)
    assert torch.equal(saved["graft.norm.weight"], base["model.norm.weight"])


def test_nothing_is_read_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = resolve(str(save_base(tmp_path / "base", "llama")))
    reads: list[list[int]] = []
    real = parts_module.read_layers

    def counted(reader, config, indices, owns, anatomy):
        reads.append(list(indices))
        return real(reader, config, indices, owns, anatomy)

    monkeypatch.setattr(parts_module, "read_layers", counted)
    with TensorReader(files) as reader:
        config = load_config(files)
        parts = ReadParts(reader, config, [1, 3], ["norm"], examine_config(config))
        assert reads == []
        assert parts.layer(3) is not parts.layer(1)
        parts.norm()
    assert reads == [[1, 3]]
