"""A tower that gives a different number of vectors for each size of an image, in 8-pixel patches.

An image of 8 pixels or less a side is one patch; sides are cut to whole patches of which a tower
has at most `MOST` a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmgraft.vision.images import to_rgb
from mmgraft.vision.plan import Plan, Size, View
from mmgraft.vision.spec import VisionSpec
from mmgraft.vision.towers.base import VisionTower
from mmgraft.vision.towers.registry import TowerShape, register_tower, tower_kinds

PATCH, MOST = 8, 6


def plan(size: Size) -> Plan:
    """One view of the image's own grid; above 4 patches also a thumbnail of one."""
    columns, rows = (min(MOST, max(1, side // PATCH)) for side in size)
    views = (View("base", (rows, columns)),)
    return Plan(views if rows * columns <= 4 else (*views, View("thumbnail", (1, 1))))


class SizedTower(VisionTower):
    """Each patch through one linear layer, and a nonlinearity over the place in its view."""

    def __init__(self, spec: VisionSpec, hidden: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.spec, self.hidden_size = spec, hidden
        self.patch = nn.Linear(3 * PATCH * PATCH, hidden)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        self.freeze()

    def plan(self, size: Size) -> Plan:
        return plan(size)

    @torch.no_grad()
    def encode(self, pixels: Tensor, plans: Sequence[Plan]) -> Tensor:
        assert len(pixels) == sum(self.entries(one) for one in plans)
        return self.patch(pixels.to(device=self.device, dtype=self.dtype))

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Flat patches of all images, `(sum of entries, 3 * 8 * 8)`."""
        found = []
        for image in map(to_rgb, images):
            for view in self.plan(image.size).views:
                rows, columns = view.grid
                small = image.resize((columns * PATCH, rows * PATCH))
                x = torch.from_numpy(np.array(small)).view(rows, PATCH, columns, PATCH, 3)
                found.append(x.transpose(1, 2).reshape(rows * columns, -1) / 255)
        return torch.cat(found)

    def identity(self) -> dict[str, Any]:
        return {"kind": "sized", "patch": PATCH, "most": MOST}


def sized_tower(hidden: int = 16, seed: int = 0) -> SizedTower:
    """A tower with random weights; its spec loads the same one again in this process."""
    if "sized" not in tower_kinds():
        register_tower("sized", _load, lambda spec: TowerShape(spec.options["hidden"], plan))
    return _load(
        VisionSpec(kind="sized", feature_layer=-1, options={"hidden": hidden, "seed": seed})
    )


def _load(spec: VisionSpec) -> SizedTower:
    return SizedTower(spec, **spec.options)
