"""Any vision model of transformers as a tower."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from mmgraft.basefiles import fetch, files, whole
from mmgraft.errors import UsageError, first_line, is_out_of_memory
from mmgraft.progress import working
from mmgraft.strict import StrictModel
from mmgraft.vision.plan import Plan
from mmgraft.vision.preprocessing import (
    Preprocessing,
    SquareResize,
    StockPreprocessing,
    load_processor,
    plain_resize,
    stored_processor,
)
from mmgraft.vision.spec import VisionSpec
from mmgraft.vision.towers.base import VisionTower
from mmgraft.vision.towers.inspection import FeatureMap, examine, is_part, skeleton, vision_config
from mmgraft.vision.towers.registry import TowerShape

_SMALL = ["config.json", "preprocessor_config.json", "processor_config.json"]
_SAFETENSORS = ["model*.safetensors", "model*.safetensors.index.json"]
_PICKLES = ["pytorch_model*.bin", "pytorch_model*.bin.index.json"]


class TransformersOptions(StrictModel):
    """Options of kind ``transformers``: preprocessing in place of the tower's own processor.

    Attributes:
        image_size: Resize every image to this square. None means the config's own size.
        image_mean: Mean of each channel on 0..1; None means the processor's.
        image_std: Standard deviation of each channel; None means the processor's.
    """

    image_size: int | None = Field(default=None, ge=1)
    image_mean: list[float] | None = Field(default=None, min_length=3, max_length=3)
    image_std: list[float] | None = Field(default=None, min_length=3, max_length=3)


class TransformersTower(VisionTower):
    """A frozen transformers vision model, read at one hidden state.

    Args:
        model: The vision model; of a two-tower model the vision half alone.
        feature_map: Where its features are.
        preprocessing: Makes its pixels.
        spec: What loads it again.
        processor: The stored image processor, or its settings where it has no PIL form.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        feature_map: FeatureMap,
        preprocessing: Preprocessing,
        spec: VisionSpec,
        processor: BaseImageProcessor | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.feature_map = feature_map
        self.preprocessing = preprocessing
        self.spec = spec
        self.hidden_size = feature_map.hidden_size
        self.fixed_plan = Plan.single(feature_map.grid)
        self.image_size = preprocessing.image_size
        self._processor = processor
        self.freeze()

    @property
    def image_processor(self) -> Any | None:
        """The stock image processor that makes the pixels, or None where a plain resize does."""
        return getattr(self.preprocessing, "processor", None)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Patch features, in the tower's own dtype: (n, 3, H, W) -> (n, P, hidden)."""
        if tuple(pixel_values.shape[-2:]) != self.image_size:
            raise UsageError(
                f"{self.spec.name} takes pixels of {self.image_size[0]} x {self.image_size[1]}, "
                f"not {tuple(pixel_values.shape)}: make them with the tower's preprocess."
            )
        # No autocast: features must not depend on whether someone trains around the tower.
        with torch.autocast(self.device.type, enabled=False):
            return self.feature_map.features(
                self.model, pixel_values.to(device=self.device, dtype=self.dtype)
            )

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of any size and mode -> (n, 3, H, W) float32."""
        return self.preprocessing(images)

    def identity(self) -> dict[str, Any]:
        """Class, config, feature layer and preprocessing."""
        config = self.model.config.to_diff_dict()
        for key in ("_name_or_path", "transformers_version", "architectures", "dtype"):
            config.pop(key, None)
        return {
            "class": type(self.model).__name__,
            "config": config,
            "layer": self.feature_map.index,
            "preprocessing": self.preprocessing.identity(),
        }

    def save(self, folder: str | Path) -> VisionSpec:
        """Write model and image processor as an ordinary transformers folder."""
        with whole.quiet():
            self.model.save_pretrained(folder)
        if isinstance(self._processor, dict):
            text = json.dumps(self._processor, indent=2) + "\n"
            (Path(folder) / "preprocessor_config.json").write_text(text, encoding="utf-8")
        elif self._processor is not None:
            self._processor.save_pretrained(folder)
        return self.spec.model_copy(update={"id": str(folder), "revision": None})


def load(spec: VisionSpec) -> TransformersTower:
    """Load the vision model that the spec names, in the dtype its weights are stored in.

    Raises:
        UsageError: No such model, no vision model, or one whose patch features cannot be found.
        MMGraftError: The Hub cannot be reached.
    """
    folder, revision = locate(spec)
    config, preprocessing, empty, feature_map = _examine(spec, folder)
    if revision is not None and spec.id is not None:
        fetch(spec.id, revision, _SAFETENSORS)
        if not any(folder.glob(_SAFETENSORS[0])):
            fetch(spec.id, revision, _PICKLES)
    spec = spec.model_copy(update={"revision": revision, "feature_layer": feature_map.layer})
    options: dict[str, Any] = {"key_mapping": {r"^vision_model\.": ""}} if is_part(config) else {}
    try:
        with working(f"loading {spec.name}") as work, whole.quiet(work):
            loaded: Any = type(empty).from_pretrained(
                folder, config=config, dtype="auto", output_loading_info=True, **options
            )
    except Exception as error:  # whatever a foreign file may raise
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"The weights of vision tower {spec.name} cannot be loaded: {first_line(error)}. "
            "Download the model again, or name another tower."
        ) from error
    model, info = loaded
    missing = frozenset(info["missing_keys"])
    needed = missing - _without_effect(empty, feature_map, preprocessing.image_size, missing)
    if needed:
        raise UsageError(
            f"{spec.name} lacks {len(needed)} weights of {type(model).__name__}, such as "
            f"{min(needed)}. Name the checkpoint of the vision model itself."
        )
    with torch.no_grad():
        for name in missing:  # a random pooler, without effect: the same every time
            model.get_parameter(name).zero_()
    processor = load_processor(folder) or stored_processor(folder)
    return TransformersTower(model, feature_map, preprocessing, spec, processor)


def describe(spec: VisionSpec) -> TowerShape:
    """Return feature width and plan, from the config and the image processor alone.

    Raises:
        UsageError: As ``load``.
        MMGraftError: As ``load``.
    """
    feature_map = outline(spec).feature_map
    return TowerShape(feature_map.hidden_size, Plan.single(feature_map.grid))


def outline(spec: VisionSpec) -> TransformersTower:
    """Build the tower without weights: its model is on the meta device.

    Raises:
        UsageError: As ``load``.
        MMGraftError: As ``load``.
    """
    _, preprocessing, empty, feature_map = _examine(spec, locate(spec)[0])
    return TransformersTower(empty, feature_map, preprocessing, spec)


def locate(spec: VisionSpec) -> tuple[Path, str | None]:
    """Return the tower's folder, and the commit that its revision stands for where it is on the
    Hub.

    Of a Hub model only config and image processor are fetched.

    Raises:
        UsageError: There is no such folder or Hub model.
        MMGraftError: The Hub cannot be reached.
    """
    if not spec.id:
        raise UsageError(
            "A vision tower of kind 'transformers' needs an id: a Hub id such as "
            "google/siglip2-so400m-patch14-384, or a local folder."
        )
    folder = Path(spec.id).expanduser()
    if folder.is_dir():
        revision = None
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", spec.id):
        folder = fetch(spec.id, spec.revision, _SMALL)
        revision = folder.name  # the cache keeps a snapshot under the name of its commit
    else:
        raise UsageError(f"There is no folder {spec.id}: check the path of the vision tower.")
    if not (folder / "config.json").is_file():
        raise UsageError(f"{spec.id} has no config.json: name a vision model, or its folder.")
    return folder, revision


def _examine(
    spec: VisionSpec, folder: Path
) -> tuple[PreTrainedConfig, Preprocessing, PreTrainedModel, FeatureMap]:
    config = vision_config(files.read_config(folder, f"vision tower {spec.name}"), spec.name)
    empty = skeleton(config, spec.name)
    preprocessing = _preprocessing(spec, folder, config)
    feature_map = examine(empty, preprocessing.image_size, spec.feature_layer, spec.name)
    return config, preprocessing, empty, feature_map


def _preprocessing(spec: VisionSpec, folder: Path, config: PreTrainedConfig) -> Preprocessing:
    options = TransformersOptions.parse(spec.options, f"options of vision tower {spec.name}")
    processor: Any = load_processor(folder)
    if not options.model_dump(exclude_none=True):
        if processor is not None:
            return StockPreprocessing(processor, spec.name)
        if square := plain_resize(stored_processor(folder) or {}):
            return square
    mean = options.image_mean or getattr(processor, "image_mean", None)
    std = options.image_std or getattr(processor, "image_std", None)
    size = options.image_size or getattr(config, "image_size", None)
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    if mean is None or std is None or not isinstance(size, int):
        raise UsageError(
            f"{spec.name} has no image processor that works here (preprocessor_config.json). Copy "
            "the one of the model it comes from into its folder, or give image_size, image_mean "
            "and image_std in the tower's options."
        )
    return SquareResize(size, mean, std)


def _without_effect(
    empty: PreTrainedModel,
    feature_map: FeatureMap,
    image_size: tuple[int, int],
    names: frozenset[str],
) -> frozenset[str]:
    """Find the weights that no feature depends on: they get no gradient, on meta."""
    if not names:
        return names
    parameters = dict(empty.named_parameters())
    pixels = torch.zeros(1, 3, *image_size, device="meta")
    with torch.enable_grad():
        feature_map.features(empty.requires_grad_(True), pixels).sum().backward()
    return frozenset(name for name in names & parameters.keys() if parameters[name].grad is None)
