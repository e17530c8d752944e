"""Vision towers: any transformers vision model, or a module registered under a kind of its own.

Importing this package loads neither torch nor transformers; its names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmgraft.model.vision.base import VisionTower
    from mmgraft.model.vision.images import load_image, to_rgb
    from mmgraft.model.vision.registry import (
        TowerKind,
        TowerShape,
        describe_tower,
        load_tower,
        register_tower,
        tower_kinds,
    )
    from mmgraft.model.vision.spec import ProjectorSpec, VisionSpec

_HOMES = {
    "ProjectorSpec": "spec",
    "TowerKind": "registry",
    "TowerShape": "registry",
    "VisionSpec": "spec",
    "VisionTower": "base",
    "describe_tower": "registry",
    "load_image": "images",
    "load_tower": "registry",
    "register_tower": "registry",
    "to_rgb": "images",
    "tower_kinds": "registry",
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
