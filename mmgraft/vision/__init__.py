"""Vision towers: any transformers vision model, or a module registered under a kind of its own.

Importing this package loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmgraft.vision.spec import ProjectorSpec, VisionSpec
from mmgraft.vision.towers.registry import (
    TowerKind,
    TowerShape,
    describe_tower,
    load_tower,
    register_tower,
    tower_kinds,
)

if TYPE_CHECKING:
    from mmgraft.vision.images import load_image, to_rgb
    from mmgraft.vision.towers.base import VisionTower

_HOMES = {"VisionTower": "towers.base", "load_image": "images", "to_rgb": "images"}

__all__ = [
    "ProjectorSpec", "TowerKind", "TowerShape", "VisionSpec", "VisionTower", "describe_tower",
    "load_image", "load_tower", "register_tower", "to_rgb", "tower_kinds",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
