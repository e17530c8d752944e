"""Towers by kind: built in, registered, or from an installed package; and the interface."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmgraft.errors import UsageError
from mmgraft.vision import VisionSpec, load_tower, register_tower, tower_kinds
from mmgraft.vision.projectors.built_in import Projector
from mmgraft.vision.towers.base import VisionTower, fingerprint_tensors
from mmgraft.vision.towers.registry import TowerShape, unregister_tower
from tiny_towers import TinyTower, picture, shape_of, tiny_tower


def loader(spec: VisionSpec) -> TinyTower:
    return TinyTower(spec, patches=3, hidden=8, seed=0)


@pytest.fixture
def kind() -> Iterator[str]:
    yield "strips"
    unregister_tower("strips")


def test_registered_tower_is_frozen_cast_and_described(kind: str) -> None:
    def thawed(spec: VisionSpec) -> TinyTower:
        tower = loader(spec).requires_grad_(True)
        assert isinstance(tower, TinyTower)
        return tower

    register_tower(kind, thawed)
    elsewhere = load_tower(kind, dtype=torch.bfloat16, device="meta")
    placed = {(one.device.type, one.dtype) for one in elsewhere.parameters()}
    assert placed == {("meta", torch.bfloat16)}
    tower = load_tower(kind, dtype=torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert tower(tower.preprocess([picture()])).shape == (1, 3, 8)
    assert tower.dtype == torch.bfloat16
    assert tower.fingerprint() == loader(tower.spec).fingerprint()
    assert shape_of(kind) == (8, 3)
    with pytest.raises(UsageError, match="already registered"):
        register_tower(kind, loader)


def test_describe_spares_the_weights(kind: str) -> None:
    def fail(spec: VisionSpec) -> TinyTower:
        raise AssertionError("loaded")

    register_tower(kind, fail, describe=lambda spec: TowerShape(12, 9))
    assert shape_of(VisionSpec(kind=kind)) == (12, 9)


def test_installed_package_offers_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "strips_tower-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strips-tower\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mmgraft.towers]\nstrips = strips_tower:load\n")
    (tmp_path / "strips_tower.py").write_text(
        "from tiny_towers import TinyTower\n"
        "def load(spec):\n"
        "    return TinyTower(spec, patches=5, hidden=8, seed=0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "strips" in tower_kinds()
    spec = VisionSpec.from_name("strips")
    assert (spec.kind, spec.id) == ("strips", None)
    assert load_tower(spec).num_patches == 5


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'efficientnet-lite2'"):
        load_tower(VisionSpec(kind="efficientnet-lite3"))


def test_name_is_a_kind_or_an_id() -> None:
    assert VisionSpec.from_name("efficientnet-lite2") == VisionSpec(kind="efficientnet-lite2")
    assert VisionSpec.from_name("google/siglip") == VisionSpec(id="google/siglip")
    assert VisionSpec.from_name("transformers").id == "transformers"
    assert VisionSpec(id="google/siglip").name == "google/siglip"


def test_importing_specs_and_registry_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from mmgraft.vision import ProjectorSpec, VisionSpec, register_tower, tower_kinds\n"
        "VisionSpec.from_name('efficientnet-lite2')\n"
        "assert not {'torch', 'transformers', 'PIL', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fingerprint_reads_names_dtypes_shapes_and_both_ends() -> None:
    tensors = {"a": torch.zeros(3, 4), "long": torch.zeros(30_000), "count": torch.tensor(3)}
    here = fingerprint_tensors({"x": 1}, tensors)
    assert here == fingerprint_tensors({"x": 1}, dict(reversed(tensors.items())))

    def end(index: int) -> torch.Tensor:
        return torch.zeros(30_000).index_fill(0, torch.tensor([index]), 1.0)

    changed = [
        {**tensors, "a": torch.zeros(4, 3)},
        {**tensors, "a": torch.zeros(3, 4, dtype=torch.float64)},
        {**tensors, "count": torch.tensor(4)},
        {**tensors, "long": end(0)},
        {**tensors, "long": end(29_999)},
        {"b": tensors["a"], "long": tensors["long"], "count": tensors["count"]},
    ]
    seen = {fingerprint_tensors({"x": 1}, values) for values in changed}
    seen.add(fingerprint_tensors({"x": 2}, tensors))
    assert len(seen) == 7
    assert here not in seen


def test_tiny_tower_of_the_tests_reloads() -> None:
    tower = tiny_tower(patches=2, hidden=8, seed=5)
    assert load_tower(tower.spec).fingerprint() == tower.fingerprint()
    assert tiny_tower(patches=2, hidden=8, seed=6).fingerprint() != tower.fingerprint()


def test_a_tower_or_projector_without_a_part_says_which() -> None:
    class Half(VisionTower):
        def preprocess(self, images: object) -> torch.Tensor:
            return torch.zeros(1, 3, 8, 8)

    class Empty(Projector):
        pass

    with pytest.raises(TypeError, match=r"Half.*identity"):
        Half()
    with pytest.raises(TypeError, match=r"Empty.*forward"):
        Empty(None, 4)

    class Sizeless(Half):
        def identity(self) -> dict[str, object]:
            return {}

    with pytest.raises(NotImplementedError, match="Sizeless has no fixed_plan: implement plan"):
        Sizeless().plan((8, 8))
    with pytest.raises(NotImplementedError, match="forward or encode of Sizeless"):
        Sizeless()(torch.zeros(1, 3, 8, 8))
