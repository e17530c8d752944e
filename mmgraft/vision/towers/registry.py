"""The registry of tower kinds. Importable without torch: loaders run when a tower is loaded."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmgraft.vision.plan import ImagePositions, Plan, Size
from mmgraft.vision.projectors.configs import ProjectorConfig
from mmgraft.vision.spec import TOWERS, TRANSFORMERS_KIND, TowerKind, VisionSpec

if TYPE_CHECKING:
    import torch

    from mmgraft.vision.towers.base import VisionTower


class TowerShape:
    """Facts of a tower that a projector and a processor need.

    Args:
        hidden_size: Width of a feature vector.
        plan: The plan of every image, or a function of an image's size; a number stands for one
            view of so many vectors.
    """

    def __init__(self, hidden_size: int, plan: Plan | Callable[[Size], Plan] | int) -> None:
        self.hidden_size = hidden_size
        self.plan = Plan.of_count(plan) if isinstance(plan, int) else plan

    @property
    def num_patches(self) -> int | None:
        """Feature vectors of one image, where all images have the same number."""
        return self.plan.entries if isinstance(self.plan, Plan) else None

    @classmethod
    def of(cls, tower: "VisionTower") -> "TowerShape":
        """Return the shape of a loaded tower."""
        return cls(tower.hidden_size, tower.fixed_plan or tower.plan)

    def positions(
        self, projector: ProjectorConfig, takes: Callable[[int], int] | None = None
    ) -> ImagePositions:
        """Return how many positions an image takes with a projector.

        Args:
            projector: Its settings.
            takes: Positions of so many vectors, where they are not as many: ``Method.positions``.
        """
        if takes is None:
            return ImagePositions(projector.counts, self.plan)
        return ImagePositions(lambda plan: takes(projector.counts(plan)), self.plan)


Loader = Callable[[VisionSpec], "VisionTower"]
Describer = Callable[[VisionSpec], TowerShape]


def _built_in(name: str, module: str) -> TowerKind:
    """Return a kind whose module, with ``load`` and ``describe``, is imported when it is needed."""

    def home() -> Any:
        return import_module(f"mmgraft.vision.towers.{module}")

    return TowerKind(name, lambda spec: home().load(spec), lambda spec: home().describe(spec))


TOWERS.register(TRANSFORMERS_KIND, _built_in(TRANSFORMERS_KIND, "transformers"))
for _name in ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"):
    TOWERS.register(_name, _built_in(_name, "efficientnet"))
tower_kinds, find_kind, unregister_tower = TOWERS.names, TOWERS.find, TOWERS.unregister


def register_tower(kind: str, loader: Loader, describe: Describer | None = None) -> None:
    """Make a tower kind known in this process.

    A package offers one to every process by an entry point in the group ``mmgraft.towers``: its
    name is the kind, its value a loader or a ``TowerKind``.

    Args:
        kind: The name that ``VisionSpec.kind`` gives it.
        loader: Called with the spec; returns a ``VisionTower`` on the CPU, in the dtype its weights
            are stored in. ``load_tower`` freezes, fingerprints, casts and moves it.
        describe: Called with the spec; returns the ``TowerShape`` without loading weights. Without
            it the tower is loaded to learn its shape.

    Raises:
        UsageError: The name is taken.
    """
    TOWERS.register(kind, TowerKind(kind, loader, describe))


def load_tower(
    spec: VisionSpec | str,
    dtype: "torch.dtype | None" = None,
    device: "torch.device | str | None" = None,
) -> "VisionTower":
    """Load a tower: frozen, in eval mode, fingerprinted, then cast and moved.

    Args:
        spec: A spec, or a name for ``VisionSpec.from_name``.
        dtype: Dtype to compute in; None keeps the one of the stored weights.
        device: Where to put it; None leaves it on the CPU.

    Raises:
        UsageError: Unknown kind, missing weights or packages, or a model that gives no features.
    """
    if isinstance(spec, str):
        spec = VisionSpec.from_name(spec)
    tower = find_kind(spec.kind).loader(spec)
    # Before the cast: both are of the stored weights, whatever dtype computes with them.
    tower.freeze().fingerprint()
    tower.sample()
    return tower.to(device=device, dtype=dtype)


def describe_tower(spec: VisionSpec | str) -> TowerShape:
    """Return feature width and plan, without loading weights where the kind can.

    Raises:
        UsageError: As ``load_tower``.
    """
    if isinstance(spec, str):
        spec = VisionSpec.from_name(spec)
    kind = find_kind(spec.kind)
    return kind.describe(spec) if kind.describe is not None else TowerShape.of(load_tower(spec))
