"""``graft_config.json``: what a graft is, which base it belongs to, which tower it sees with."""

import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmgraft.atomic import complete
from mmgraft.errors import UsageError
from mmgraft.grafts.method import Promises
from mmgraft.grafts.registry import get_method, methods, moved
from mmgraft.strict import StrictModel
from mmgraft.textfiles import read_json
from mmgraft.version import __version__
from mmgraft.vision.plan import ImagePositions
from mmgraft.vision.projectors.configs import MlpConfig
from mmgraft.vision.projectors.registry import AnyProjector
from mmgraft.vision.spec import VisionSpec
from mmgraft.vision.towers.registry import TowerShape

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
CONFIG_NAME = "graft_config.json"
WEIGHTS_NAME = "graft.safetensors"
#: Folder inside a graft's folder that holds a base of its own (trained, or imported).
OWN_BASE = "base"


_noted: set[Path] = set()  # files whose reading has said what moved


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BaseReference(_Strict):
    """The base: referred to, never copied.

    Attributes:
        id: Hub id, local path, or ``"./base"`` for a base that lies inside the graft's folder.
        revision: Commit id on the Hub.
        fingerprint: Normalised config and edges of every tensor, see ``basefiles.fingerprint``.
    """

    id: str
    revision: str | None = None
    fingerprint: dict[str, Any] = Field(default_factory=dict)


class ImageToken(_Strict):
    """The id that fills image positions in ``input_ids``; positions are known by their kind."""

    id: int
    why: str = ""


class TemplateChoice(_Strict):
    """Choice of a template: the tokenizer's, plain, or a file's text.

    Attributes:
        text: The file's; of kind "chat" the name of one of several templates, while it is chosen.
        options: Variables of the template, such as ``enable_thinking``.
    """

    kind: Literal["chat", "plain", "file"] = "chat"
    text: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class SeenFeatures(_Strict):
    """Some features of a fixed image as the tower gave them (``VisionTower.sample``)."""

    sample: list[float]
    transformers: str = Field(default_factory=lambda: version("transformers"))


class GraftFile(_Strict):
    """The whole record.

    Attributes:
        vision_features: None in grafts of mmgraft versions that recorded none.
        state: What of the graft runs now: a stage may run a part of it.
        base_trained: Text is then the trained base's, not the original's.
        trained_from: The original of a trained base, to compare with.
        recipe: The resolved recipe of the last training.
        results: Measured results, for the model card.
    """

    schema_version: int = SCHEMA_VERSION
    mmgraft_version: str = __version__
    method: str
    config: dict[str, Any]
    workflow: str = "mm"
    base: BaseReference
    vision: VisionSpec
    vision_fingerprint: str | None = None
    vision_features: SeenFeatures | None = None
    projector: AnyProjector = MlpConfig()
    image_token: ImageToken
    template: TemplateChoice = TemplateChoice()
    state: dict[str, Any] = Field(default_factory=dict)
    base_trained: bool = False
    trained_from: BaseReference | None = None
    recipe: dict[str, Any] | None = None
    results: dict[str, Any] | None = None

    @property
    def settings(self) -> StrictModel:
        """The method's settings."""
        return get_method(self.method).config_class.parse(self.config, f"config of {CONFIG_NAME}")

    @property
    def promises(self) -> Promises:
        """Return what the method promises of this graft; all, where the method is not installed."""
        method = methods().get(self.method)
        return Promises() if method is None else method.promises(self.settings)

    def positions(self, shape: TowerShape) -> ImagePositions:
        """Return how many positions an image takes, of a tower of this shape."""
        method = methods().get(self.method)
        return shape.positions(self.projector, method and method.positions)

    def dump(self) -> str:
        """Return the file's text."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def dump_config(self) -> str:
        """Return the text of the ``config.json`` by which transformers knows a graft."""
        base = self.base.fingerprint.get("config")
        kind = {"model_type": "mmgraft", "architectures": ["GraftedModel"]}
        config = {**kind, "image_token_id": self.image_token.id, "text_config": base}
        return json.dumps(config, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "GraftFile":
        """Read and check a graft's config.

        Raises:
            UsageError: No graft there, a corrupt file, an unknown key or a newer schema.
        """
        complete(folder)
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise UsageError(
                f"{folder} holds no {CONFIG_NAME}, so it is no graft. "
                "Make one with: mmgraft graft BASE --method METHOD"
            )
        data = read_json(path, "restore it from a checkpoint, or graft again.")
        version = data.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise UsageError(
                f"{path} has schema version {version}; this mmgraft ({__version__}) reads up to "
                f"{SCHEMA_VERSION}. Upgrade it: pip install -U mmgraft"
            )
        if isinstance(data.get("method"), str) and isinstance(data.get("config"), dict):
            data["method"], data["config"], note = moved(data["method"], data["config"])
            if note is not None and path not in _noted:
                _noted.add(path)
                _log.warning("%s: %s", path, note)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise UsageError(
                f"{path} is not a graft config that this mmgraft knows: {where}: {first['msg']}. "
                "It may be damaged, or written by another version: pip install -U mmgraft"
            ) from None
