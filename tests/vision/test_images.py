"""Image files become RGB as a person sees them, or an error that names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmgraft.errors import UsageError
from mmgraft.vision.images import BadImage, load_image, look, read_file, to_rgb
from tiny_towers import picture


def look_at(path: Path) -> tuple[int, int]:
    return read_file(path, look)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))  # black, but not there
    if mode == "P":
        image = image.quantize(4)
    image.convert(mode).save(tmp_path / "a.png")
    seen = load_image(tmp_path / "a.png")
    assert seen.mode == "RGB"
    assert seen.getpixel((0, 0)) == (255, 255, 255)
    assert seen.getpixel((1, 0)) == (0, 0, 0)


def test_half_transparent_is_mixed() -> None:
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    red, green, blue = to_rgb(image).getpixel((0, 0))  # type: ignore[misc]
    assert red == 255
    assert green == blue == 127


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 100 + 50, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    seen = np.asarray(load_image(tmp_path / "deep.png"))[0, :, 1]
    assert seen.tolist() == [0, 100, 255]


def test_grey_and_cmyk_become_rgb() -> None:
    assert to_rgb(Image.new("L", (1, 1), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert to_rgb(Image.new("CMYK", (1, 1), (0, 0, 0, 255))).getpixel((0, 0)) == (0, 0, 0)


def test_picture_is_turned_upright(tmp_path: Path) -> None:
    image = picture(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: to be shown rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").tobytes() == image.rotate(-90, expand=True).tobytes()


def test_files_that_are_no_pictures_are_named(tmp_path: Path) -> None:
    picture(64, 64).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    for name in ("cut.png", "text.jpg", "empty.png"):
        with pytest.raises(UsageError, match=f"cannot be read: .*{name}"):
            load_image(tmp_path / name)
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(UsageError, match=f"not found: {path}"):
            load_image(path)


@pytest.mark.parametrize("limit", [20, 60])  # Pillow raises below half the pixels, else it warns
def test_decompression_bomb_is_refused(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", (10, 10)).save(tmp_path / "bomb.png")
    load_image(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UsageError, match=r"too large: .*bomb\.png .* Scale it down"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_a_look_at_both_ends_finds_a_cut_and_decodes_nothing_whole(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    picture(48, 32).save(whole, format=format)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    with pytest.raises(BadImage, match=f"cannot be read: {cut}"):
        look_at(cut)
    if format in ("PNG", "JPEG", "GIF"):
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert look_at(whole) == (48, 32)


def test_what_is_wrong_is_told_in_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(10, 10).save(tmp_path / "bomb.png")
    (tmp_path / "empty.png").touch()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    names = {"bomb.png": "enormous", "none.png": "missing", "empty.png": "broken"}
    for name, fault in names.items():
        with pytest.raises(BadImage) as caught:
            look_at(tmp_path / name)
        assert caught.value.fault == fault
