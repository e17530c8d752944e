"""Vision towers: any transformers vision model, or a module registered under a kind of its own.

Importing this package loads neither torch nor transformers; its names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmgraft.vision.images import load_image, to_rgb
    from mmgraft.vision.spec import ProjectorSpec, VisionSpec
    from mmgraft.vision.towers.base import VisionTower
    from mmgraft.vision.towers.registry import (
        TowerKind,
        TowerShape,
        describe_tower,
        load_tower,
        register_tower,
        tower_kinds,
    )

_HOMES = {
    "ProjectorSpec": "spec",
    "TowerKind": "towers.registry",
    "TowerShape": "towers.registry",
    "VisionSpec": "spec",
    "VisionTower": "towers.base",
    "describe_tower": "towers.registry",
    "load_image": "images",
    "load_tower": "towers.registry",
    "register_tower": "towers.registry",
    "to_rgb": "images",
    "tower_kinds": "towers.registry",
}

__all__ = [
    "ProjectorSpec",
    "TowerKind",
    "TowerShape",
    "VisionSpec",
    "VisionTower",
    "describe_tower",
    "load_image",
    "load_tower",
    "register_tower",
    "to_rgb",
    "tower_kinds",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
