"""The vision tower interface: pixels in, one feature vector a patch out, always frozen."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import Self

from mmgraft.vision.spec import VisionSpec

_EDGE_BYTES = 16 * 1024


class VisionTower(nn.Module):
    """A frozen image encoder.

    A subclass sets the attributes below and implements `forward`, `preprocess` and `identity`.

    Attributes:
        spec: The spec that loads this tower again, with nothing left to a default.
        hidden_size: Width of a feature vector.
        num_patches: Feature vectors of one image; the base spends as many positions on it.
        image_size: (height, width) of the pixels that `preprocess` returns.
    """

    spec: VisionSpec
    hidden_size: int
    num_patches: int
    image_size: tuple[int, int]
    _fingerprint: str | None = None

    @abstractmethod
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of preprocessed images: (n, 3, H, W) -> (n, num_patches, hidden_size)."""
        raise NotImplementedError

    @abstractmethod
    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pixels for `forward`: images of any size and mode -> (n, 3, H, W) float32 on the CPU."""
        raise NotImplementedError

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All but the weights that decides the features: config, layer, preprocessing (JSON)."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> VisionSpec:
        """Write into `folder` what is needed to load the tower without its source.

        Returns:
            The spec that loads it from there. A kind whose weights come with an installed package
            writes nothing and returns its own spec.
        """
        return self.spec

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def freeze(self) -> Self:
        """Take every parameter out of training and put the module in eval mode."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a tower is frozen; dropout and batch statistics must not act."""
        return super().train(False)

    def fingerprint(self) -> str:
        """SHA-256 of what decides the features; computed once, at the first call.

        It covers `identity` and, of every tensor, name, dtype, shape and the first and last 16 KiB.
        `load_tower` calls it before any cast, so that the dtype of the computation is not in it.
        """
        if self._fingerprint is None:
            self._fingerprint = fingerprint_tensors(self.identity(), self.state_dict())
        return self._fingerprint


def fingerprint_tensors(identity: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over a JSON identity and the edges of every tensor, in order of their names."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.view(-1)
        edge = max(1, _EDGE_BYTES // tensor.element_size())
        for part in (flat[:edge], flat[max(edge, flat.numel() - edge) :]):
            digest.update(part.clone().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
