"""The registry of projectors. Importable without torch: modules load when one is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError

from mmgraft.errors import UsageError
from mmgraft.strict import describe
from mmgraft.vision.kinds import Kinds
from mmgraft.vision.projectors.configs import (
    LinearConfig,
    MlpConfig,
    PixelShuffleConfig,
    PoolConfig,
    ProjectorConfig,
)

if TYPE_CHECKING:
    from mmgraft.vision.projectors.base import Projector


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
    load: Callable[[], Callable[..., Projector]]


def _built_in(name: str, title: str, config: type[ProjectorConfig], module: str) -> ProjectorKind:
    def load() -> type[Projector]:
        return getattr(import_module("mmgraft.vision.projectors.built_in"), module)

    return ProjectorKind(name, title, config, load)


_SHUFFLE = "k x k neighbours side by side, then two linear layers"
_POOL = "the mean of k x k neighbours, then two linear layers"
_KINDS: Kinds[ProjectorKind] = Kinds("projector", "mmgraft.projectors", lambda _, kind: kind)
for _kind in (
    _built_in("mlp", "two linear layers", MlpConfig, "MlpProjector"),
    _built_in("linear", "one linear layer", LinearConfig, "LinearProjector"),
    _built_in("pixel_shuffle", _SHUFFLE, PixelShuffleConfig, "PixelShuffleProjector"),
    _built_in("pool", _POOL, PoolConfig, "PoolProjector"),
):
    _KINDS.register(_kind.name, _kind)
projectors, find_projector, unregister_projector = _KINDS.names, _KINDS.find, _KINDS.unregister


def register_projector(kind: ProjectorKind) -> None:
    """Make a projector known in this process.

    A package offers one to every process by an entry point in the group ``mmgraft.projectors``:
    its name is the kind's, its value the ``ProjectorKind``.

    Raises:
        UsageError: The name is taken.
    """
    _KINDS.register(kind.name, kind)


def build_projector(config: ProjectorConfig, in_features: int, out_features: int) -> Projector:
    """Make a fresh projector.

    Args:
        config: Its settings.
        in_features: Width of the tower's features.
        out_features: Width of the base's embeddings.
    """
    return find_projector(config.kind).load()(config, in_features, out_features)


def _of_kind(value: Any) -> Any:
    """Settings of the projector that they name."""
    if not isinstance(value, dict):
        return value
    try:
        config_class = find_projector(str(value.get("kind", "mlp"))).config_class
    except UsageError as error:
        raise ValueError(str(error)) from None
    try:
        return config_class.model_validate(value)
    except ValidationError as error:
        kind = value.get("kind", "mlp")
        raise ValueError(describe(error, config_class, f"projector {kind}")) from None


AnyProjector = Annotated[SerializeAsAny[ProjectorConfig], BeforeValidator(_of_kind)]
"""A field of a config that takes the settings of any registered projector."""
