"""The specification of a vision tower: pydantic, importable without torch."""

from collections.abc import Callable
from typing import Any

from pydantic import ConfigDict, Field

from mmgraft.frozen import Frozen
from mmgraft.kinds import Kinds, Unfit
from mmgraft.strict import StrictModel
from mmgraft.vision.projectors.configs import MlpConfig

TRANSFORMERS_KIND = "transformers"


class VisionSpec(StrictModel):
    """Reference to a vision tower, and to the hidden state that gives the features.

    Attributes:
        kind: ``"transformers"``, or a name registered with ``register_tower`` (or through the entry
            point group ``mmgraft.towers``), such as ``"efficientnet-lite2"``.
        id: Hub id or local folder of the tower; kinds that know their own weights leave it empty.
        revision: Hub commit, branch or tag.
        feature_layer: Index into the tower's hidden states. None means the tower's default: -2
            for transformers that give tokens (as LLaVA, IAA and Wings do), -1 for convolutional
            ones. A loaded tower's ``spec`` always holds the number that was used.
        options: Further settings of the kind; each kind refuses those it does not know.
    """

    model_config = ConfigDict(frozen=True)

    kind: str = TRANSFORMERS_KIND
    id: str | None = None
    revision: str | None = None
    feature_layer: int | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def from_name(cls, name: str) -> "VisionSpec":
        """Return the spec a user means by one word: a registered kind, or else a Hub id or a
        folder.
        """
        if name != TRANSFORMERS_KIND and name in TOWERS.names():
            return cls(kind=name)
        return cls(id=name)

    @property
    def name(self) -> str:
        """Return how messages and cards call the tower."""
        return self.id or self.kind


class TowerKind(Frozen):
    """One kind of tower.

    Attributes:
        name: As ``VisionSpec.kind`` names it.
        loader: Returns the ``VisionTower`` of a spec.
        describe: Returns its ``TowerShape`` without its weights; None where that takes the tower.
    """

    name: str
    loader: Callable[[VisionSpec], Any]
    describe: Callable[[VisionSpec], Any] | None = None

    @classmethod
    def of_entry_point(cls, name: str, value: Any, origin: str) -> "TowerKind":
        """Return the kind that a package offers, as such or as its loader alone.

        Raises:
            Unfit: It is neither, or a kind of another name.
        """
        if not isinstance(value, cls) and callable(value):
            value = cls(name, value)
        if not isinstance(value, cls) or not callable(value.loader):
            raise Unfit(f"a {type(value).__name__} is neither a loader nor an mmgraft TowerKind")
        if value.name != name:
            raise Unfit(f"the kind calls itself {value.name!r}")
        return value


#: Values of ``VisionSpec.kind``; ``towers/registry.py`` adds them.
TOWERS: Kinds[TowerKind] = Kinds("vision tower kind", "mmgraft.towers", TowerKind.of_entry_point)
#: The public name of the usual projector's settings.
ProjectorSpec = MlpConfig
