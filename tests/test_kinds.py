"""Projectors and towers of installed packages: one that is broken is named and disturbs nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmgraft.errors import UsageError
from mmgraft.recipes.recipe import Recipe
from mmgraft.vision import VisionSpec, load_tower
from mmgraft.vision.projectors.configs import LinearConfig, MlpConfig
from mmgraft.vision.projectors.registry import (
    PROJECTORS,
    ProjectorKind,
    build_projector,
    register_projector,
    unregister_projector,
)
from mmgraft.vision.towers.registry import TOWERS, TowerKind, register_tower

CODE = """\
from mmgraft.vision.projectors.configs import LinearConfig, ProjectorConfig
from mmgraft.vision.projectors.registry import ProjectorKind
from mmgraft.vision.towers.registry import TowerKind


class OddConfig(ProjectorConfig):
    kind: str = "odd"


GOOD = ProjectorKind("odd", "something odd", OddConfig, lambda: __import__("not_installed"))
OTHER = ProjectorKind("other", "another name", OddConfig, lambda: None)
FOREIGN = ProjectorKind("odd", "settings of another", LinearConfig, lambda: None)
BARE = ProjectorKind("odd", "settings that are none", dict, lambda: None)
NUMBER = 3
TOWER = TowerKind("other", lambda spec: None)
UNLOADABLE = TowerKind("odd", None)
"""
Offer = Callable[..., None]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Install a package whose entry points are given by group, as ``name = target``."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "oddities", raising=False)

    def install(group: str, *points: str) -> None:
        info = tmp_path / "oddities-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: oddities\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join([f"[mmgraft.{group}]", *points]) + "\n")
        (tmp_path / "oddities.py").write_text(CODE)
        (tmp_path / "ending.py").write_text("raise SystemExit(3)\n")

    return install


BROKEN = [
    ("projectors", "nothing:KIND", "ModuleNotFoundError"),
    ("projectors", "oddities:NOTHING", "AttributeError"),
    ("projectors", "ending:KIND", "SystemExit"),
    ("projectors", "oddities:NUMBER", "a int, not an mmgraft ProjectorKind"),
    ("projectors", "oddities:OTHER", "calls itself 'other'"),
    ("projectors", "oddities:FOREIGN", "LinearConfig needs the field kind = 'odd'"),
    ("projectors", "oddities:BARE", "no subclass of ProjectorConfig"),
    ("towers", "nothing:load", "ModuleNotFoundError"),
    ("towers", "oddities:NUMBER", "neither a loader nor an mmgraft TowerKind"),
    ("towers", "oddities:UNLOADABLE", "neither a loader nor an mmgraft TowerKind"),
    ("towers", "oddities:TOWER", "calls itself 'other'"),
]


@pytest.mark.parametrize(("group", "target", "reason"), BROKEN)
def test_a_broken_package_is_named(offer: Offer, cli, group: str, target: str, reason: str) -> None:
    offer(group, f"odd = {target}")
    with pytest.raises(UsageError, match=f"'odd' of the package 'oddities'.*{reason}"):
        (PROJECTORS if group == "projectors" else TOWERS).find("odd")
    ran = cli("methods")
    assert ran.code == 0
    assert "pixel_shuffle" in ran.out
    assert reason in " ".join(ran.err.split())
    assert "'odd' of the package 'oddities' cannot be used" in " ".join(ran.err.split())


def test_a_recipe_and_a_spec_name_the_broken_package(offer: Offer) -> None:
    offer("projectors", "odd = nothing:KIND", "[mmgraft.towers]", "odd = nothing:load")
    graft = {"method": "llava", "projector": {"kind": "odd"}}
    with pytest.raises(UsageError, match="package 'oddities' is broken"):
        Recipe.parse({"name": "a", "graft": graft, "stages": []}, "recipe")
    with pytest.raises(UsageError, match="package 'oddities' is broken"):
        load_tower(VisionSpec(kind="odd"))


def test_a_name_that_is_taken_is_named_and_the_first_one_kept(offer: Offer, cli) -> None:
    offer("projectors", "mlp = oddities:GOOD", "odd = oddities:GOOD")
    data = json.loads(cli("methods", "--json").out)
    assert [one["name"] for one in data["broken"]] == ["mlp"]
    assert data["projectors"]["odd"] == "something odd"
    assert PROJECTORS.find("mlp").config_class is MlpConfig


def test_a_projector_whose_class_is_not_there_is_named(offer: Offer) -> None:
    offer("projectors", "odd = oddities:GOOD")
    with pytest.raises(
        UsageError, match=r"'odd' of the package 'oddities' is broken: .*not_installed"
    ):
        build_projector(PROJECTORS.find("odd").config_class(), 4, 8)


def test_registering_checks_too() -> None:
    with pytest.raises(UsageError, match=r"'odd' cannot be registered.*kind = 'odd'"):
        register_projector(ProjectorKind("odd", "", LinearConfig, lambda: None))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="already registered"):
        register_projector(PROJECTORS.find("linear"))
    with pytest.raises(UsageError, match=r"'odd' cannot be registered.*neither a loader"):
        register_tower("odd", None)  # type: ignore[arg-type]
    unregister_projector("odd")
    assert isinstance(TOWERS.find("transformers"), TowerKind)
