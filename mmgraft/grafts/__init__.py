"""The methods, one folder each, and what the author of another method needs.

Those that need torch are loaded when first used: a method's config must import without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmgraft.grafts.method import Method, PlainDecoder, Promises, StageSwitches
from mmgraft.layers import parse_layers
from mmgraft.strict import LayerChoice, Option, StrictModel

if TYPE_CHECKING:
    from mmgraft.anatomy import Anatomy
    from mmgraft.grafts.base import (
        FULL_ATTENTION,
        IMAGE,
        MEMORY,
        PADDING,
        TEXT,
        BaseParts,
        Graft,
        Memory,
        Packed,
        Pass,
        select,
    )
    from mmgraft.grafts.lowrank import LowRank
    from mmgraft.patching import patched_forward

_HOMES = {
    "mmgraft.anatomy": ("Anatomy",),
    "mmgraft.grafts.base": (
        *("FULL_ATTENTION", "IMAGE", "MEMORY", "PADDING", "TEXT"),
        *("BaseParts", "Graft", "Memory", "Packed", "Pass", "select"),
    ),
    "mmgraft.grafts.lowrank": ("LowRank",),
    "mmgraft.patching": ("patched_forward",),
}

__all__ = [
    "FULL_ATTENTION", "IMAGE", "MEMORY", "PADDING", "TEXT", "Anatomy", "BaseParts", "Graft",
    "LayerChoice", "LowRank", "Memory", "Method", "Option", "Packed", "Pass", "PlainDecoder",
    "Promises", "StageSwitches", "StrictModel", "parse_layers", "patched_forward", "select",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = getattr(import_module(home), name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
