"""The registry of tower kinds. Importable without torch: loaders run when a tower is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, NamedTuple

from mmgraft.errors import UsageError, did_you_mean
from mmgraft.vision.spec import TRANSFORMERS_KIND, VisionSpec

if TYPE_CHECKING:
    import torch

    from mmgraft.vision.towers.base import VisionTower

ENTRY_POINT_GROUP = "mmgraft.towers"


class TowerShape(NamedTuple):
    """What a projector must know of a tower: the feature width and the positions of one image."""

    hidden_size: int
    num_patches: int


Loader = Callable[[VisionSpec], "VisionTower"]
Describer = Callable[[VisionSpec], TowerShape]


@dataclass(frozen=True)
class TowerKind:
    """One kind of tower: how to load it and, optionally, how to learn its shape without weights."""

    name: str
    loader: Loader
    describe: Describer | None = None


def _load_transformers(spec: VisionSpec) -> VisionTower:
    from mmgraft.vision.towers.transformers import load

    return load(spec)


def _describe_transformers(spec: VisionSpec) -> TowerShape:
    from mmgraft.vision.towers.transformers import describe

    return describe(spec)


def _load_efficientnet(spec: VisionSpec) -> VisionTower:
    from mmgraft.vision.towers.efficientnet import load

    return load(spec)


def _describe_efficientnet(spec: VisionSpec) -> TowerShape:
    from mmgraft.vision.towers.efficientnet import describe

    return describe(spec)


_KINDS: dict[str, TowerKind] = {
    TRANSFORMERS_KIND: TowerKind(TRANSFORMERS_KIND, _load_transformers, _describe_transformers)
}
for _name in ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"):
    _KINDS[_name] = TowerKind(_name, _load_efficientnet, _describe_efficientnet)


def register_tower(kind: str, loader: Loader, describe: Describer | None = None) -> None:
    """Make a tower kind known in this process.

    A package offers one to every process by an entry point in the group ``mmgraft.towers``: its
    name is the kind, its value a loader or a `TowerKind`.

    Args:
        kind: The name that `VisionSpec.kind` gives it.
        loader: Called with the spec; returns a `VisionTower` on the CPU, in the dtype its weights
            are stored in. `load_tower` freezes, fingerprints, casts and moves it.
        describe: Called with the spec; returns the `TowerShape` without loading weights. Without
            it the tower is loaded to learn its shape.

    Raises:
        UsageError: The name is taken.
    """
    if kind in _KINDS:
        raise UsageError(f"The vision tower kind '{kind}' is already registered: use another name.")
    _KINDS[kind] = TowerKind(kind, loader, describe)


def unregister_tower(kind: str) -> None:
    """Forget a kind that `register_tower` added; unknown kinds are ignored."""
    _KINDS.pop(kind, None)


def tower_kinds() -> list[str]:
    """Every kind that can be loaded: built in, registered, or offered by an installed package."""
    return sorted({*_KINDS, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def find_kind(kind: str) -> TowerKind:
    """The registered kind of that name.

    Raises:
        UsageError: No such kind; names the nearest one.
    """
    if kind in _KINDS:
        return _KINDS[kind]
    for point in entry_points(group=ENTRY_POINT_GROUP, name=kind):
        value = point.load()
        return value if isinstance(value, TowerKind) else TowerKind(kind, value)
    raise UsageError(f"Unknown vision tower kind {kind!r}; {did_you_mean(kind, tower_kinds())}")


def load_tower(
    spec: VisionSpec | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> VisionTower:
    """Load a tower: frozen, in eval mode, fingerprinted, then cast and moved.

    Args:
        spec: A spec, or a name for `VisionSpec.from_name`.
        dtype: Dtype to compute in; None keeps the one of the stored weights.
        device: Where to put it; None leaves it on the CPU.

    Raises:
        UsageError: Unknown kind, missing weights or packages, or a model that gives no features.
    """
    if isinstance(spec, str):
        spec = VisionSpec.from_name(spec)
    tower = find_kind(spec.kind).loader(spec)
    # Before the cast: the fingerprint names the stored weights, whatever dtype computes with them.
    tower.fingerprint()
    return tower.freeze().to(device=device, dtype=dtype)


def describe_tower(spec: VisionSpec | str) -> TowerShape:
    """Feature width and positions of one image, without loading weights where the kind can.

    Raises:
        UsageError: As `load_tower`.
    """
    if isinstance(spec, str):
        spec = VisionSpec.from_name(spec)
    kind = find_kind(spec.kind)
    if kind.describe is not None:
        return kind.describe(spec)
    tower = load_tower(spec)
    return TowerShape(tower.hidden_size, tower.num_patches)
