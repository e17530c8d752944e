"""The vision tower of a published checkpoint: inside it, or named by it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from mmgraft.basefiles.tensor_files import write_shards
from mmgraft.errors import UsageError
from mmgraft.published.names import Published
from mmgraft.published.source import Source
from mmgraft.vision.preprocessing import stored_processor
from mmgraft.vision.spec import VisionSpec

_CLASSES = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
_PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class TowerPlan:
    """Reference of an imported graft to its tower.

    Attributes:
        spec: What loads it; its id is a placeholder where it is written beside the graft.
        config: Config of a tower that is written.
        processor: Image processor of a tower that is written.
        notes: What the user should know.
    """

    spec: VisionSpec
    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan_tower(source: Source, published: Published, named: str | None) -> TowerPlan:
    """Decide where the tower comes from.

    Args:
        source: The checkpoint.
        published: What is in it.
        named: Hub id or folder to use instead of the one that the checkpoint names.

    Raises:
        UsageError: When config or weights of the tower cannot be found.
    """
    spec = VisionSpec(id=named or published.tower_id, feature_layer=published.feature_layer)
    if not published.tower_tensors:
        if spec.id is None or not _findable(spec.id):
            raise UsageError(
                f"the checkpoint has no vision tower inside and names {spec.id!r}, which is no "
                "folder here and no Hub id; give the tower it was trained with by --tower"
            )
        return TowerPlan(spec)
    config = source.read_json("vision_config.json") or _config_of(spec.id)
    if config is None or config.get("model_type") not in _CLASSES:
        kind = "no vision_config.json" if config is None else repr(config.get("model_type"))
        raise UsageError(
            f"the checkpoint's vision tower has {kind}, and {spec.id!r} gives no CLIP or SigLIP "
            "config; name the tower it was made from by --tower (a Hub id or a folder)"
        )
    width = source.tensors["model.mm_projector.0.weight"].shape[1]
    if config["hidden_size"] != width:
        raise UsageError(
            f"the tower's config says {config['hidden_size']} features and the checkpoint's "
            f"projector takes {width}; name the right tower by --tower"
        )
    notes: list[str] = []
    processor = source.read_json(_PROCESSOR) or _processor_of(spec.id)
    if processor is None:
        processor = _default_processor(config)
        notes.append(
            f"no image processor came with the checkpoint; the tower has {config['model_type']}'s "
            "own means and sizes"
        )
    if source.config.get("image_aspect_ratio") == "pad":
        notes.append(
            "the published code pads an image to a square before the image processor resizes it, "
            "which mmgraft does not do: pad images beforehand to see them as it did"
        )
    return TowerPlan(spec, _plain_config(config), processor, notes)


def write_tower(source: Source, published: Published, plan: TowerPlan, folder: Path) -> None:
    """Write the tower inside the checkpoint as an ordinary transformers folder."""
    tensors = {ours: source.tensors[name] for ours, name in published.tower_tensors.items()}
    write_shards(folder, "model", tensors)
    for name, data in (("config.json", plan.config), (_PROCESSOR, plan.processor)):
        (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _findable(name: str) -> bool:
    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return is_id or Path(name).expanduser().is_dir()


def _config_of(name: str | None) -> dict[str, Any] | None:
    """Return the vision config of a model on the Hub or in a folder, or None."""
    if name is None or not _findable(name):
        return None
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    return getattr(config, "vision_config", config).to_dict()


def _processor_of(name: str | None) -> dict[str, Any] | None:
    """Return the image processor's settings of a model on the Hub or in a folder, or None."""
    found = name is not None and _findable(name)
    return stored_processor(Path(name).expanduser()) if found and name else None


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with the fields alone that its class has today."""
    known = CONFIG_MAPPING[config["model_type"]]().to_dict()
    dropped = ("_name_or_path", "transformers_version", "id2label", "label2id", "dtype")
    kept = {key: config[key] for key in known if key in config and key not in dropped}
    return {**kept, "architectures": [_CLASSES[config["model_type"]]]}


def _default_processor(config: dict[str, Any]) -> dict[str, Any]:
    """Return what CLIP and SigLIP were trained with; sources: their papers' released processors."""
    size = config["image_size"]
    square = {"height": size, "width": size}
    siglip = config["model_type"] == "siglip_vision_model"
    crop = {} if siglip else {"do_center_crop": True, "crop_size": square}
    return {
        "image_processor_type": "SiglipImageProcessor" if siglip else "CLIPImageProcessor",
        "size": square if siglip else {"shortest_edge": size},
        **crop,
        "image_mean": [0.5] * 3 if siglip else [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.5] * 3 if siglip else [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "resample": 3,
    }
