"""Check what an image file may hold, and what is made of it wherever an image enters."""

from __future__ import annotations

import base64
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmgraft.data.images import check_image, open_image
from mmgraft.errors import UsageError
from mmgraft.vision.images import BadImage, load_image, read_file
from mmgraft.vision.images import look as look_of
from mmgraft.vision.preprocessing import StockPreprocessing
from tiny import tiny_clip_dir
from tiny_towers import picture

pytestmark = pytest.mark.xdist_group("bad-input")  # one worker makes the parts


def look_at(path: Path) -> tuple[int, int]:
    return read_file(path, look_of)


RAMP = np.array([[0, 51, 102, 255]])


def grey(values: Any, dtype: str) -> Image.Image:
    return Image.fromarray(np.asarray(values, dtype=dtype))


# Modes: (what is saved, the format, grey values that must come out)
MODES: dict[str, tuple[Image.Image, str, list[int]]] = {
    "1": (grey(RAMP > 60, "bool"), "PNG", [0, 0, 255, 255]),
    "L": (grey(RAMP, "u1"), "PNG", [0, 51, 102, 255]),
    "P": (grey(RAMP, "u1").convert("P"), "GIF", [0, 51, 102, 255]),
    "RGB": (grey(RAMP, "u1").convert("RGB"), "BMP", [0, 51, 102, 255]),
    "RGBA": (grey(RAMP, "u1").convert("RGBA"), "PNG", [0, 51, 102, 255]),
    "LA": (grey(RAMP, "u1").convert("LA"), "PNG", [0, 51, 102, 255]),
    "CMYK": (grey(RAMP, "u1").convert("RGB").convert("CMYK"), "TIFF", [0, 51, 102, 255]),
    "YCbCr": (grey(RAMP, "u1").convert("RGB").convert("YCbCr"), "TIFF", [0, 51, 102, 255]),
    "I;16 of 16 bits": (grey(RAMP * 257, "u2"), "PNG", [0, 51, 102, 255]),
    "I;16 of 8 bits": (grey(RAMP, "u2"), "TIFF", [0, 51, 102, 255]),
    "I;16B": (grey(RAMP * 257, ">u2"), "TIFF", [0, 51, 102, 255]),
    "I of 8 bits": (grey(RAMP, "i4"), "TIFF", [0, 51, 102, 255]),
    "I of 16 bits": (grey(RAMP * 257, "i4"), "TIFF", [0, 51, 102, 255]),
    "F of 0 to 1": (grey(RAMP / 255, "f4"), "TIFF", [0, 51, 102, 255]),
    "F of 8 bits": (grey(RAMP, "f4"), "TIFF", [0, 51, 102, 255]),
    "F of 16 bits": (grey(RAMP * 257, "f4"), "TIFF", [0, 51, 102, 255]),
    "F of a mask": (grey([[0, 1, 1, 0]], "f4"), "TIFF", [0, 255, 255, 0]),
}
NO_RANGE: dict[str, Image.Image] = {
    "negative": grey([[-1.0, 0.0, 1.0]], "f4"),
    "metres": grey([[0.3, 7.5, 80.0]], "f4"),
    "nan": grey([[0.0, np.nan, 1.0]], "f4"),
    "inf": grey([[0.0, np.inf, 1.0]], "f4"),
    "32 bits": grey([[0, 70_000, 2**31 - 1]], "i4"),
    "negative whole": grey([[-5, 0, 5]], "i4"),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_comes_out_in_its_own_range(mode: str, tmp_path: Path) -> None:
    image, kind, wanted = MODES[mode]
    image.save(tmp_path / "a", kind)
    for seen in (load_image(tmp_path / "a"), open_image(image, "row")):
        assert seen.mode == "RGB"
        assert np.abs(np.asarray(seen)[0].astype(int) - np.array(wanted)[:, None]).max() <= 1
    assert look_at(tmp_path / "a") == image.size


@pytest.mark.parametrize("mode", NO_RANGE)
def test_values_without_a_known_range_are_refused(mode: str, tmp_path: Path) -> None:
    NO_RANGE[mode].save(tmp_path / "a.tiff")
    for look in (load_image, look_at):
        with pytest.raises(BadImage, match=r"a\.tiff: grey values from"):
            look(tmp_path / "a.tiff")
    for look in (open_image, check_image):
        with pytest.raises(BadImage, match="row 3: grey values from"):
            look(NO_RANGE[mode], "row 3")


@pytest.mark.parametrize("turn", range(1, 9))
def test_an_image_is_turned_as_its_exif_data_says(turn: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    picture(6, 4).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert load_image(tmp_path / "a.jpg").size == ((4, 6) if turn > 4 else (6, 4))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_image_is_shown(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "green", "blue")]
    more = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:], **more)
    assert load_image(tmp_path / "a").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(3000, 1), (1, 201), (4020, 20)])
def test_a_thin_image_is_refused_before_it_is_decoded(size: Any, tmp_path: Path) -> None:
    Image.new("RGB", size).save(tmp_path / "thin.png")
    for look in (load_image, look_at):
        with pytest.raises(BadImage, match=r"thin\.png: .* 200 times") as caught:
            look(tmp_path / "thin.png")
        assert caught.value.fault == "enormous"
    with pytest.raises(BadImage, match="200 times"):
        open_image(Image.new("RGB", size), "row 3")


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (3, 3), (1, 1), (40, 3)])
def test_images_that_are_less_thin_are_seen(size: Any, tmp_path: Path) -> None:
    from mmgraft.vision.preprocessing import load_processor

    see = StockPreprocessing(load_processor(tiny_clip_dir(tmp_path)), "tiny")
    assert see([Image.new("RGB", size, "red")]).shape == (1, 3, 16, 16)


def test_what_a_large_tower_would_resize_to_gigabytes_is_refused(tmp_path: Path) -> None:
    from mmgraft.vision.preprocessing import load_processor

    see = StockPreprocessing(load_processor(tiny_clip_dir(tmp_path, image_size=1024)), "large")
    tracemalloc.start()
    with pytest.raises(BadImage, match="resized to 1024 at its short side"):
        see([Image.new("RGB", (190, 1))])
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


# How an image is named


def png() -> bytes:
    stream = io.BytesIO()
    picture(6, 4).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", ["a.png", "with space/é.png", "50%.png", "a%20b.png", "a#b?.png"])
def test_a_file_address_names_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(png())
    for address in (path.as_uri(), f"file://{path}", f"file://localhost{path.as_uri()[7:]}"):
        assert open_image(address, "row").size == (6, 4)
    rows = tmp_path / "rows.jsonl"
    part = [{"type": "image", "image": path.as_uri()}, {"type": "text", "text": "what?"}]
    turns = [{"role": "user", "content": part}, {"role": "assistant", "content": "that"}]
    rows.write_text(json.dumps({"messages": turns}))
    from mmgraft.data.formats.sources import read_rows

    (row,) = read_rows(rows)
    assert row.messages[0]["content"][0]["image"] == str(path)


@pytest.mark.parametrize("breaks", ["\n", "\r\n", " ", "\n  "])
def test_a_wrapped_data_uri_is_read(breaks: str) -> None:
    text = base64.encodebytes(png()).decode().strip().replace("\n", breaks)
    assert open_image(f"data:image/png;base64,{text}", "row").size == (6, 4)
    with pytest.raises(UsageError, match=r"row 3: .*no image"):
        open_image("data:image/png;base64,####", "row 3")


def test_a_path_of_windows_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="/ in place of each backslash"):
        load_image(tmp_path / "sub\\red.png")


# Wherever an image enters


@pytest.fixture(params=["thin", "depths"])
def spoiled(request: pytest.FixtureRequest, here: Path) -> Path:
    """Rows of which the second shows an image that cannot be used."""
    folder = here / "pictures"
    folder.mkdir()
    Image.new("RGB", (20, 16), "red").save(folder / "good.png")
    wrong = Image.new("RGB", (900, 2)) if request.param == "thin" else Image.new("F", (4, 4), -2)
    wrong.save(folder / "wrong.tiff")
    rows = []
    for name in ("good.png", "wrong.tiff"):
        part = [{"type": "image", "image": name}, {"type": "text", "text": "which?"}]
        turns = [{"role": "user", "content": part}, {"role": "assistant", "content": "red"}]
        rows.append(json.dumps({"messages": turns}))
    (here / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return here / "rows.jsonl"


DOORS: dict[str, Callable[[Path, Path], list[object]]] = {
    "chat": lambda run, rows: ["chat", run, "hi", "--image", rows.parent / "pictures/wrong.tiff"],
    "generate": lambda run, rows: [
        *["generate", run, rows, "--images", rows.parent / "pictures", "--out", "out.jsonl"]
    ],
    "train": lambda run, rows: [
        *["train", run, "--data", rows, "--images", rows.parent / "pictures"]
    ],
    "cache": lambda run, rows: [
        *["train", run, "--data", rows, "--images", rows.parent / "pictures"],
        *["--set", "feature_cache=true"],
    ],
}


@pytest.mark.parametrize("door", DOORS)
def test_it_is_refused_at_every_door(refused, run, spoiled: Path, door: str) -> None:
    assert "wrong.tiff" in refused(*DOORS[door](run, spoiled))


@pytest.mark.parametrize("more", [[], ["--quick"]], ids=["whole", "quick"])
def test_a_look_at_the_rows_lists_it(cli, spoiled: Path, more: list[str]) -> None:
    looked = cli("data", "check", spoiled, "--images", spoiled.parent / "pictures", *more)
    assert looked.code == 2
    assert "wrong.tiff" in looked.out


@pytest.mark.parametrize("form", ["'{}'", '"{}"', "{}", "file://{}"])
def test_a_file_dropped_on_a_terminal_is_found(form: str, tmp_path: Path) -> None:
    from mmgraft.cli.chat import _dropped

    path = tmp_path / "a picture.png"
    path.write_bytes(png())
    assert open_image(_dropped(form.format(path)), "row").size == (6, 4)
    assert _dropped(str(path).replace(" ", "\\ ")) == str(path)
    assert _dropped("it's.png") == "it's.png"
