from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image

from mmgraft.demo.assets import Package
from mmgraft.errors import UsageError
from photographs import backdrop, find_photographs, open_photograph
from tiny_stamps import make_photographs


def test_a_folder_is_searched_for_pictures(tmp_path: Path) -> None:
    make_photographs(tmp_path / "sub")
    (tmp_path / "notes.txt").write_text("no picture")
    assert [path.name for path in find_photographs(tmp_path)] == ["black.jpg", "white.png"]


def test_packaged_photographs_are_those_that_are_there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Package, "folder", property(lambda self: tmp_path / self.module))
    (tmp_path / "skimage/data").mkdir(parents=True)
    (tmp_path / "sklearn/datasets/images").mkdir(parents=True)
    for name in ("skimage/data/coffee.png", "skimage/data/text.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sklearn/datasets/images/china.jpg").write_bytes(b"")
    found = [path.name for path in find_photographs()]
    assert found == ["coffee.png", "china.jpg"], "text.png is no photograph of a scene"


def test_without_photographs_it_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UsageError, match="--photos"):
        find_photographs(tmp_path)
    monkeypatch.setattr(Package, "folder", None)
    with pytest.raises(UsageError, match="pip install --no-deps scikit-image"):
        find_photographs()


def test_a_broken_photograph_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"broken\.jpg cannot be read"):
        open_photograph(tmp_path / "broken.jpg")


def test_a_backdrop_is_a_square_of_the_photograph() -> None:
    """Red grows to the right and green downwards, so that a crop's place can be read off."""
    photograph = Image.new("RGB", (200, 100))
    photograph.putdata([(x, y * 2, 0) for y in range(100) for x in range(200)])
    seen = set()
    for seed in range(30):
        made = backdrop(photograph, 32, random.Random(seed))
        assert made.size == (32, 32)
        left, right = made.getpixel((1, 16))[0], made.getpixel((30, 16))[0]
        top, bottom = made.getpixel((16, 1))[1], made.getpixel((16, 30))[1]
        assert bottom > top, "never upside down"
        assert 30 <= abs(right - left) <= 100, "as wide as 0.4 to 1 of the shorter side"
        seen.add(right > left)
        assert made.tobytes() == backdrop(photograph, 32, random.Random(seed)).tobytes()
    assert seen == {True, False}, "mirrored every other time"
