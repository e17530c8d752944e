"""Images of any size to the pixels of one tower: by its image processor, or a plain resize."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmgraft.errors import UsageError, first_line
from mmgraft.textfiles import read_json
from mmgraft.vision.images import BadImage, to_rgb

_LARGEST_SIDE = 2**13
#: Largest number of pixels of an image after its resize; each takes ten bytes.
_MOST_PIXELS = 2**26

_DECIDING_FIELDS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct", "do_rescale",
    "rescale_factor", "rescale_offset", "do_normalize", "include_top", "image_mean",
    "image_std", "do_pad", "pad_size",
)  # fmt: skip


class SquareResize:
    """The whole image as a square (its aspect not kept), then ``(x * scale - mean) / std``.

    Args:
        size: Side of the square in pixels.
        mean: Mean of each channel, after scaling.
        std: Standard deviation of each channel, after scaling.
        scale: Factor on the bytes.
        resample: Pillow's filter, by number.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        scale: float = 1 / 255,
        resample: int = Image.Resampling.BICUBIC,
    ) -> None:
        self.image_size = (size, size)
        self.mean, self.std, self.scale = tuple(mean), tuple(std), scale
        self.resample = Image.Resampling(resample)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of any size and mode -> (n, 3, size, size) float32."""
        height, width = self.image_size
        arrays = [
            np.asarray(to_rgb(image).resize((width, height), self.resample)) for image in images
        ]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() * self.scale
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return ((pixels - mean) / std).contiguous()

    def identity(self) -> dict[str, Any]:
        """Return what decides the pixels, as JSON."""
        return {
            "square": self.image_size[0],
            "mean": list(self.mean),
            "std": list(self.std),
            "scale": self.scale,
            "resample": self.resample.value,
        }


class StockPreprocessing:
    """A tower's own image processor of transformers, held to one output size.

    Args:
        processor: The image processor (PIL backend).
        name: The tower's name, for messages.

    Raises:
        UsageError: Images of different shape come out in different sizes.
    """

    def __init__(self, processor: Any, name: str) -> None:
        self.processor = processor
        try:
            _refuse_huge(processor)
            sizes = {
                tuple(self._run([Image.new("RGB", shape)]).shape[1:])
                for shape in ((64, 40), (40, 96))
            }
        except Exception as error:  # whatever foreign settings may raise
            raise UsageError(
                f"The image processor of {name} cannot be used ({first_line(error)}): mend its "
                "preprocessor_config.json, or name another vision tower."
            ) from error
        size = sizes.pop()
        if sizes or len(size) != 3 or size[0] != 3:
            raise UsageError(
                f"The image processor of {name} ({type(processor).__name__}) does not bring every "
                "image to one size of three channels. Give a fixed one in the tower's options: "
                "image_size (with image_mean and image_std where the processor has none)."
            )
        self.image_size = (size[1], size[2])

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of any size and mode -> (n, 3, H, W) float32.

        Raises:
            BadImage: Its resize, before the crop, would take too much memory.
        """
        short = _plain(getattr(self.processor, "size", None) or {}).get("shortest_edge") or 0
        for wide, high in (image.size for image in images):
            if short**2 * max(wide, high) > _MOST_PIXELS * min(wide, high):
                raise BadImage(
                    f"an image of {wide} x {high} pixels would be resized to {short} at its short "
                    f"side, and so to more than {_MOST_PIXELS:,} pixels; crop it",
                    "enormous",
                )
        return self._run([to_rgb(image) for image in images])

    def _run(self, images: list[Image.Image]) -> Tensor:
        return self.processor(images=images, return_tensors="pt")["pixel_values"].float()

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the pixels: not all fields, as newer versions may add
        some.
        """
        values = {key: getattr(self.processor, key, None) for key in _DECIDING_FIELDS}
        name = type(self.processor).__name__.removesuffix("Pil").removesuffix("Fast")
        return {"class": name} | {
            key: _plain(value) for key, value in values.items() if value is not None
        }


#: Turns images into pixels of one fixed size.
Preprocessing = SquareResize | StockPreprocessing


def _refuse_huge(processor: Any) -> None:
    for key in ("size", "crop_size", "pad_size"):
        sides = _plain(getattr(processor, key, None) or {})
        if any(isinstance(side, int) and side > _LARGEST_SIDE for side in sides.values()):
            raise ValueError(f"{key} is {sides}, larger than any vision tower's")


def _plain(value: Any) -> Any:
    """Return sizes, tuples and enums as JSON has them."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | float | str):
        return value
    fields = value if isinstance(value, dict) else vars(value)
    return {key: _plain(item) for key, item in sorted(fields.items()) if item is not None}


def load_processor(folder: Path) -> Any | None:
    """Return the image processor that comes in a model's folder, or None where there is none to
    use.

    Always the PIL backend: the same pixels on every machine, with or without torchvision.
    """
    from transformers import AutoImageProcessor
    from transformers.image_processing_backends import TorchvisionBackend

    if not stored_processor(folder):
        return None
    try:
        processor = AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=False
        )
    except Exception:  # whatever a foreign file may raise
        return None
    return None if isinstance(processor, TorchvisionBackend) else processor


def stored_processor(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the image processor in a model's folder, whether it can be loaded
    or not.

    Raises:
        UsageError: Its file is damaged.
    """
    from transformers import BaseImageProcessor

    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            read_json(folder / name, "copy it from the vision model once more")
    try:
        return BaseImageProcessor.get_image_processor_dict(folder)[0]
    except (OSError, ValueError):
        return None


def plain_resize(stored: dict[str, Any]) -> SquareResize | None:
    """Return what the settings of a processor without a PIL form (DINOv3) say, if a plain
    resize.
    """
    size = stored.get("size")
    mean, std = stored.get("image_mean"), stored.get("image_std")
    plain = not (stored.get("do_center_crop") or stored.get("auto_map"))
    if not (isinstance(size, dict) and plain and mean and std):
        return None
    height, width = size.get("height"), size.get("width")
    if height is None or height != width:
        return None
    scale = stored.get("rescale_factor", 1 / 255)
    return SquareResize(height, mean, std, scale, stored.get("resample", 2))
