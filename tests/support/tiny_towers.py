"""Tiny random vision towers: one of each transformers class, and one of our own interface."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmgraft.vision.preprocessing import SquareResize
from mmgraft.vision.spec import VisionSpec
from mmgraft.vision.towers.base import VisionTower
from mmgraft.vision.towers.registry import describe_tower, register_tower, tower_kinds

_TOKENS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_DINO = {key: value for key, value in _TOKENS.items() if key != "intermediate_size"}
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}


@dataclass(frozen=True)
class TinyVision:
    """One vision class of transformers.

    `prefix` counts the tokens before the patches; None where the model gives a grid (n, C, H, W).
    """

    model: str
    config: str
    values: dict[str, Any]
    prefix: int | None
    size: int = 32


TOWERS: dict[str, TinyVision] = {
    "clip": TinyVision("CLIPVisionModel", "CLIPVisionConfig", _TOKENS, 1),
    "siglip": TinyVision("SiglipVisionModel", "SiglipVisionConfig", _TOKENS, 0),
    "dinov2": TinyVision("Dinov2Model", "Dinov2Config", _DINO | {"mlp_ratio": 2}, 1),
    "dinov2-registers": TinyVision(
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        _DINO | {"mlp_ratio": 2, "num_register_tokens": 4},
        5,
    ),
    "dinov3": TinyVision(
        "DINOv3ViTModel", "DINOv3ViTConfig", _TOKENS | {"num_register_tokens": 4}, 5
    ),
    "vit": TinyVision("ViTModel", "ViTConfig", _TOKENS | {"hidden_dropout_prob": 0.5}, 1),
    "deit": TinyVision("DeiTModel", "DeiTConfig", _TOKENS, 2),
    "beit": TinyVision("BeitModel", "BeitConfig", _TOKENS, 1),
    "swin": TinyVision(
        "SwinModel",
        "SwinConfig",
        {
            "image_size": 64,
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 2],
            "window_size": 2,
        },
        0,
        64,
    ),
    "convnext": TinyVision("ConvNextModel", "ConvNextConfig", _STAGES, None, 96),
    "resnet": TinyVision("ResNetModel", "ResNetConfig", _STAGES | {"embedding_size": 8}, None, 96),
    "regnet": TinyVision(
        "RegNetModel",
        "RegNetConfig",
        _STAGES | {"embedding_size": 8, "groups_width": 4},
        None,
        96,
    ),
    "mobilenet-v2": TinyVision(
        "MobileNetV2Model", "MobileNetV2Config", {"depth_multiplier": 0.25}, None, 64
    ),
    "efficientnet": TinyVision(
        "EfficientNetModel",
        "EfficientNetConfig",
        {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320},
        None,
        64,
    ),
}


def tiny_vision_model(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The model, random, in fp32 and eval mode; batch norms hold statistics that act."""
    tiny = TOWERS[name]
    config = getattr(transformers, tiny.config)(**{**tiny.values, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, tiny.model)(config).eval()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return model


def save_processor(folder: Path, size: int, kind: str = "SiglipImageProcessor") -> None:
    """A preprocessor_config.json that resizes to a square."""
    values = {"image_processor_type": kind, "size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def save_tower(folder: Path, name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Write model and processor as an ordinary folder; returns the model."""
    model = tiny_vision_model(name, seed, **overrides)
    model.save_pretrained(folder)
    save_processor(folder, overrides.get("image_size", TOWERS[name].size))
    return model


class TinyTower(VisionTower):
    """One convolution over `patches` strips of the picture: a tower of our own interface."""

    def __init__(self, spec: VisionSpec, patches: int, hidden: int, seed: int) -> None:
        super().__init__()
        self.spec = spec
        self.hidden_size = hidden
        self.num_patches = patches
        self.preprocessing = SquareResize(8 * patches, [0.5] * 3, [0.5] * 3)
        self.image_size = self.preprocessing.image_size
        self.strips = nn.Conv2d(3, hidden, (8 * patches, 8), stride=8)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        self.freeze()

    def forward(self, pixel_values: Tensor) -> Tensor:
        grid = self.strips(pixel_values.to(device=self.device, dtype=self.dtype))
        return grid.flatten(2).transpose(1, 2).contiguous()

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        return self.preprocessing(images)

    def identity(self) -> dict[str, Any]:
        return {"kind": "tiny", "preprocessing": self.preprocessing.identity()}


def tiny_tower(patches: int = 4, hidden: int = 16, seed: int = 0) -> VisionTower:
    """A tower with random weights; its spec loads the same one again in this process."""
    if "tiny" not in tower_kinds():
        register_tower("tiny", _load_tiny)
    options = {"patches": patches, "hidden": hidden, "seed": seed}
    return _load_tiny(VisionSpec(kind="tiny", feature_layer=-1, options=options))


def _load_tiny(spec: VisionSpec) -> VisionTower:
    return TinyTower(spec, **spec.options)


def shape_of(tower: VisionSpec | str) -> tuple[int, int | None]:
    """Feature width and vectors of one image, as `describe_tower` says."""
    shape = describe_tower(tower)
    return shape.hidden_size, shape.num_patches


_PATTERNS: tuple[Callable[[int, int], tuple[int, int, int]], ...] = (
    lambda x, y: (7 * x % 256, 5 * y % 256, 3 * (x + y) % 256),
    lambda x, y: (255 - x % 256, x * y % 256, 11 * y % 256),
)


def picture(width: int = 40, height: int = 30, which: int = 0) -> Image.Image:
    """A picture without symmetries."""
    image = Image.new("RGB", (width, height))
    image.putdata([_PATTERNS[which](x, y) for y in range(height) for x in range(width)])
    return image
