"""Finds and reads the golden cases: what the published implementations computed."""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

IMAGE_ID = -200
TOWER = "model.vision_tower.vision_tower.vision_model"


@dataclass(frozen=True)
class GoldenCase:
    """One folder of golden data.

    Attributes:
        path: the folder, readable as a published checkpoint.
        state: the checkpoint's tensors by their published names.
        config: its config.json.
        vision_config: its vision_config.json.
        notes: per sample what it is (task type, generated ids).
        samples: per sample its fields.
    """

    path: Path
    state: dict[str, Tensor]
    config: dict[str, Any]
    vision_config: dict[str, Any]
    notes: dict[str, dict[str, Any]]
    samples: dict[str, dict[str, Tensor]]


def golden_root() -> Path | None:
    """The folder that `MMGRAFT_GOLDEN` names, or None where it is not set and not insisted on."""
    named = os.environ.get("MMGRAFT_GOLDEN")
    if not named and os.environ.get("MMGRAFT_REQUIRE_GOLDEN") == "1":
        raise FileNotFoundError("MMGRAFT_REQUIRE_GOLDEN=1, but MMGRAFT_GOLDEN is not set")
    if not named:
        return None
    if not Path(named).is_dir():
        raise FileNotFoundError(f"MMGRAFT_GOLDEN names {named}, which is no folder")
    return Path(named)


def sample_ids(method: str) -> list[tuple[str, str]]:
    """All (case, sample) pairs of a method, for parametrising tests; empty without golden data."""
    root = golden_root()
    folders = sorted((root / method).iterdir()) if root else []
    return [
        (f"{method}/{folder.name}", name)
        for folder in folders
        for name in json.loads((folder / "samples.json").read_text())["samples"]
    ]


@cache
def golden_case(name: str) -> GoldenCase:
    """Reads the case `iaa/...` or `wings/...`."""
    root = golden_root()
    if root is None:
        raise FileNotFoundError("set MMGRAFT_GOLDEN to the folder of golden data")
    path = root / name

    def read(file: str) -> dict[str, Any]:
        return json.loads((path / file).read_text())

    samples: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / "samples.safetensors").items():
        sample, _, field = key.partition(".")
        samples.setdefault(sample, {})[field] = tensor
    return GoldenCase(
        path=path,
        state=load_file(path / "model.safetensors"),
        config=read("config.json"),
        vision_config=read("vision_config.json"),
        notes=read("samples.json")["samples"],
        samples=samples,
    )


def row_lengths(sample: dict[str, Tensor], image_length: int) -> list[int]:
    """Expanded length of each row: its real tokens, every image counted as `image_length`."""
    ids = sample["input_ids"]
    real = sample.get("attention_mask")
    lengths = [ids.shape[1]] * ids.shape[0] if real is None else real.sum(1).tolist()
    images = (ids == IMAGE_ID).sum(1).tolist()
    return [
        length + count * (image_length - 1) for length, count in zip(lengths, images, strict=True)
    ]
