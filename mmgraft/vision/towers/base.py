"""The vision tower interface: images in, feature vectors out, always frozen."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import Self

from mmgraft.errors import UsageError
from mmgraft.vision.plan import Plan, Size
from mmgraft.vision.spec import VisionSpec

_EDGE_BYTES = 16 * 1024
_SAMPLED = 32


class VisionTower(nn.Module, ABC):
    """A frozen image encoder.

    A subclass sets the attributes below and implements ``preprocess`` and ``identity``; one whose
    images all take the same plan also sets ``fixed_plan`` and implements ``forward``, any other one
    implements ``plan`` and ``encode``.

    Attributes:
        spec: The spec that loads this tower again, with nothing left to a default.
        hidden_size: Width of a feature vector.
        fixed_plan: The plan of every image; None where it depends on an image's size.
        image_size: (height, width) of the pixels that ``preprocess`` returns, where it is fixed.
    """

    spec: VisionSpec
    hidden_size: int
    fixed_plan: Plan | None = None
    image_size: tuple[int, int]
    _fingerprint: str | None = None
    _sample: list[float] | None = None

    @property
    def num_patches(self) -> int:
        """Feature vectors of one image, where all images have the same number."""
        if self.fixed_plan is None:
            raise UsageError(
                f"{self.spec.name} gives a different number of vectors for each size of an image: "
                "ask its plan."
            )
        return self.entries(self.fixed_plan)

    @num_patches.setter
    def num_patches(self, vectors: int) -> None:
        self.fixed_plan = Plan.of_count(vectors)

    def plan(self, size: Size) -> Plan:
        """Return what becomes of an image of one size (width, height); no pixels are read."""
        if self.fixed_plan is None:
            raise NotImplementedError(f"{type(self).__name__} has no fixed_plan: implement plan")
        return self.fixed_plan

    def entries(self, plan: Plan) -> int:
        """Return the number of feature vectors of one image."""
        return plan.entries

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of preprocessed images: (n, 3, H, W) -> (n, num_patches, hidden_size)."""
        raise NotImplementedError(f"implement forward or encode of {type(self).__name__}")

    def encode(self, pixels: Tensor, plans: Sequence[Plan]) -> Tensor:
        """Return the features of preprocessed images, image after image.

        Args:
            pixels: From ``preprocess``.
            plans: One an image.

        Returns:
            ``(sum of entries, hidden_size)``, the vectors of a view row by row. Those of one image
            do not depend on the others.
        """
        return self(pixels).flatten(0, 1)

    @abstractmethod
    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pixels for ``encode``: images of any size and mode -> float32 on the CPU.

        (n, 3, H, W) of a tower with a fixed plan; of another one in a shape of its own, all images
        in one tensor.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return all but the weights that decides the features (JSON).

        Config, layer, preprocessing and, where plans are not fixed, the rule that makes them.
        """

    def save(self, folder: str | Path) -> VisionSpec:
        """Write into ``folder`` what is needed to load the tower without its source.

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

        It covers ``identity`` and, of every tensor, name, dtype, shape and the first and last 16
        KiB. ``load_tower`` calls it before any cast, so that the dtype of the computation is not in
        it.
        """
        if self._fingerprint is None:
            self._fingerprint = fingerprint_tensors(self.identity(), self.state_dict())
        return self._fingerprint

    @torch.no_grad()
    def sample(self) -> list[float]:
        """Return some features of one fixed image in fp32: they differ where the features do.

        Another version of a library may read the same weights otherwise. Computed once, at the
        first call; ``load_tower`` calls it before any cast.
        """
        if self._sample is None:
            stored = {tensor.dtype for tensor in self.parameters()}
            if len(stored) == 1:
                self.float()
            ramp, disc = Image.linear_gradient("L"), Image.radial_gradient("L")
            image = Image.merge("RGB", (ramp, disc, ramp.rotate(90)))
            pixels = self.preprocess([image]).to(self.device)
            found = self.encode(pixels, [self.plan(image.size)]).flatten().float().cpu()
            picked = found[torch.linspace(0, found.numel() - 1, _SAMPLED).long()]
            self._sample = [float(f"{number:.6g}") for number in picked.tolist()]
            if len(stored) == 1:
                self.to(dtype=stored.pop())
        return self._sample

    def features_key(self) -> str:
        """Return the name of this tower's features on disk: its fingerprint and coarse features."""
        coarse = " ".join(f"{number:.1e}" for number in self.sample())
        return hashlib.sha256(f"{self.fingerprint()} {coarse}".encode()).hexdigest()


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
