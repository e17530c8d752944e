"""Preprocessing gives one size, whatever comes in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmgraft.errors import UsageError
from mmgraft.vision.preprocessing import SquareResize, StockPreprocessing, load_processor
from tiny_towers import picture, save_processor


def test_square_resize_shows_the_whole_picture() -> None:
    resize = SquareResize(8, [10.0, 20.0, 30.0], [2.0, 4.0, 5.0], scale=1.0)
    wide = Image.new("RGB", (40, 10), (0, 0, 0))
    wide.paste((255, 255, 255), (0, 0, 20, 10))  # the left half
    pixels = resize([wide, picture(3, 5)])
    assert pixels.shape == (2, 3, 8, 8)
    assert pixels.dtype == torch.float32
    assert pixels[0, :, 4, 0].tolist() == [245 / 2, 235 / 4, 45.0]
    assert pixels[0, :, 4, 7].tolist() == [-5.0, -5.0, -6.0]


def test_square_resize_is_pillows() -> None:
    image = picture(50, 20)
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = SquareResize(16, [0.0] * 3, [1.0] * 3)([image])
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), expected / 255, atol=1e-7)


def test_identity_tells_settings_apart(tmp_path: Path) -> None:
    first = SquareResize(8, [0.5] * 3, [0.5] * 3)
    others = [
        SquareResize(9, [0.5] * 3, [0.5] * 3),
        SquareResize(8, [0.4] * 3, [0.5] * 3),
        SquareResize(8, [0.5] * 3, [0.4] * 3),
        SquareResize(8, [0.5] * 3, [0.5] * 3, scale=1.0),
        SquareResize(8, [0.5] * 3, [0.5] * 3, resample=0),
    ]
    assert all(json.dumps(other.identity()) != json.dumps(first.identity()) for other in others)
    save_processor(tmp_path, 8)
    stock = StockPreprocessing(load_processor(tmp_path), "tower")
    save_processor(tmp_path, 9)
    other = StockPreprocessing(load_processor(tmp_path), "tower")
    assert json.dumps(stock.identity()) != json.dumps(other.identity())


def test_stock_processor_sees_transparency_over_white(tmp_path: Path) -> None:
    save_processor(tmp_path, 8)
    stock = StockPreprocessing(load_processor(tmp_path), "tower")
    clear = stock([Image.new("RGBA", (20, 20), (0, 0, 0, 0))])
    assert torch.equal(clear, torch.ones(1, 3, 8, 8))


def test_processor_without_one_size_is_refused(tmp_path: Path) -> None:
    values = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    processor = load_processor(tmp_path)
    with pytest.raises(UsageError, match="does not bring every image to one size"):
        StockPreprocessing(processor, "tower")


def test_no_processor(tmp_path: Path) -> None:
    assert load_processor(tmp_path) is None
