"""The registry of projectors. Importable without torch: modules load when one is made."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError

from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.kinds import Broken, Kinds, Unfit
from mmgraft.strict import describe
from mmgraft.vision.projectors import configs

if TYPE_CHECKING:
    from mmgraft.vision.projectors.built_in import Projector


class ProjectorKind(Frozen):
    """One kind of projector.

    Attributes:
        name: As ``kind`` in a recipe and in ``graft_config.json`` names it.
        title: What it does, in a few words.
        config_class: Its settings.
        load: Returns its class, a subclass of :class:`Projector`.
        origin: The package that brought it, filled in by the registry.
    """

    name: str
    title: str
    config_class: type[configs.ProjectorConfig]
    load: "Callable[[], Callable[..., Projector]]"
    origin: str = "mmgraft"


def _built_in(
    name: str, title: str, config: type[configs.ProjectorConfig], place: str
) -> ProjectorKind:
    def load() -> "type[Projector]":
        file, _, projector = place.partition(".")
        return getattr(import_module(f"mmgraft.vision.projectors.{file}"), projector)

    return ProjectorKind(name, title, config, load)


def _of_package(name: str, kind: Any, origin: str) -> ProjectorKind:
    if not isinstance(kind, ProjectorKind):
        raise Unfit(f"it is a {type(kind).__name__}, not an mmgraft ProjectorKind")
    if kind.name != name:
        raise Unfit(f"the kind calls itself {kind.name!r}")
    settings: Any = kind.config_class
    if not (isinstance(settings, type) and issubclass(settings, configs.ProjectorConfig)):
        raise Unfit(f"its config_class {settings!r} is no subclass of ProjectorConfig")
    if settings.model_fields["kind"].default != name:
        raise Unfit(f"{settings.__name__} needs the field kind = {name!r}")
    return replace(kind, origin=origin)


_SHUFFLE = "k x k neighbours side by side, then two linear layers"
_POOL = "the mean of k x k neighbours, then two linear layers"
_PERCEIVER = "latents that read the features, as Flamingo or Idefics2 has them"
_QFORMER = "BLIP-2's Q-Former, with its published weights"
PROJECTORS: Kinds[ProjectorKind] = Kinds("projector", "mmgraft.projectors", _of_package)
for _kind in (
    _built_in("mlp", "two linear layers", configs.MlpConfig, "built_in.MlpProjector"),
    _built_in("linear", "one linear layer", configs.LinearConfig, "built_in.LinearProjector"),
    _built_in(
        "pixel_shuffle", _SHUFFLE, configs.PixelShuffleConfig, "built_in.PixelShuffleProjector"
    ),
    _built_in("pool", _POOL, configs.PoolConfig, "built_in.PoolProjector"),
    _built_in("perceiver", _PERCEIVER, configs.PerceiverConfig, "perceiver.PerceiverProjector"),
    _built_in("qformer", _QFORMER, configs.QFormerConfig, "qformer.QFormerProjector"),
):
    PROJECTORS.register(_kind.name, _kind)
projectors, find_projector = PROJECTORS.names, PROJECTORS.find
unregister_projector = PROJECTORS.unregister


def register_projector(kind: ProjectorKind) -> None:
    """Make a projector known in this process.

    A package offers one to every process by an entry point in the group ``mmgraft.projectors``:
    its name is the kind's, its value the ``ProjectorKind``.

    Raises:
        UsageError: The name is taken, or the kind cannot be used.
    """
    PROJECTORS.register(kind.name, kind)


def build_projector(
    config: configs.ProjectorConfig, in_features: int, out_features: int
) -> "Projector":
    """Make a fresh projector.

    Args:
        config: Its settings.
        in_features: Width of the tower's features.
        out_features: Width of the base's embeddings.

    Raises:
        UsageError: Its class cannot be imported.
    """
    kind = find_projector(config.kind)
    try:
        made = kind.load()
    except (ImportError, AttributeError) as error:
        raise Broken(kind.name, kind.origin, str(error), "projector").error() from error
    return made(config, in_features, out_features)


def _of_kind(value: Any) -> Any:
    """Read settings as those of the projector that they name."""
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


#: A field of a config that takes the settings of any registered projector.
AnyProjector = Annotated[SerializeAsAny[configs.ProjectorConfig], BeforeValidator(_of_kind)]
