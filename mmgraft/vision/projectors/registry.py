"""The registry of projectors. Importable without torch: modules load when one is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from mmgraft.errors import UsageError, did_you_mean
from mmgraft.vision.projectors.configs import (
    LinearConfig,
    MlpConfig,
    PixelShuffleConfig,
    PoolConfig,
    ProjectorConfig,
)

if TYPE_CHECKING:
    from mmgraft.vision.projectors.base import Projector

ENTRY_POINT_GROUP = "mmgraft.projectors"


@dataclass(frozen=True)
class ProjectorKind:
    """One kind of projector.

    Attributes:
        name: As ``kind`` in a recipe and in ``graft_config.json`` names it.
        title: What it does, in a few words.
        config_class: Its settings.
        load: Returns its class, a subclass of :class:`Projector`.
    """

    name: str
    title: str
    config_class: type[ProjectorConfig]
    load: Callable[[], type[Projector]]


def _built_in(name: str, title: str, config: type[ProjectorConfig], module: str) -> ProjectorKind:
    def load() -> type[Projector]:
        return getattr(import_module(f"mmgraft.vision.projectors.{name}"), module)

    return ProjectorKind(name, title, config, load)


_KINDS = {
    kind.name: kind
    for kind in (
        _built_in("mlp", "two linear layers", MlpConfig, "MlpProjector"),
        _built_in("linear", "one linear layer", LinearConfig, "LinearProjector"),
        _built_in(
            "pixel_shuffle",
            "k x k neighbours side by side, then two linear layers",
            PixelShuffleConfig,
            "PixelShuffleProjector",
        ),
        _built_in(
            "pool", "the mean of k x k neighbours, then two linear layers", PoolConfig,
            "PoolProjector",
        ),
    )
}  # fmt: skip


def register_projector(kind: ProjectorKind) -> None:
    """Make a projector known in this process.

    A package offers one to every process by an entry point in the group ``mmgraft.projectors``:
    its name is the kind's, its value the `ProjectorKind`.

    Raises:
        UsageError: The name is taken.
    """
    if kind.name in _KINDS:
        raise UsageError(f"The projector '{kind.name}' is already registered: use another name.")
    _KINDS[kind.name] = kind


def unregister_projector(name: str) -> None:
    """Forget a kind that `register_projector` added; unknown kinds are ignored."""
    _KINDS.pop(name, None)


def projectors() -> list[str]:
    """Every projector that can be made: built in, registered, or of an installed package."""
    return sorted({*_KINDS, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def find_projector(name: str) -> ProjectorKind:
    """Return the projector of that name.

    Raises:
        UsageError: No such projector; names the nearest one.
    """
    if name in _KINDS:
        return _KINDS[name]
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return point.load()
    raise UsageError(f"unknown projector {name!r}; {did_you_mean(name, projectors())}")


def build_projector(config: ProjectorConfig, in_features: int, out_features: int) -> Projector:
    """Make a fresh projector.

    Args:
        config: Its settings.
        in_features: Width of the tower's features.
        out_features: Width of the base's embeddings.
    """
    return find_projector(config.kind).load()(config, in_features, out_features)
