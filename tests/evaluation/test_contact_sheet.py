from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageFont

from mmgraft.errors import UsageError
from mmgraft.evaluation.contact_sheet import (
    FONT,
    MARGIN,
    PICTURE,
    RIGHT,
    TILE,
    WRONG,
    Tile,
    contact_sheet,
    fold,
    save_sheet,
    shorten,
)

FILL = (10, 200, 240)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 32), FILL).save(tmp_path / "one.png")
    return tmp_path / "one.png"


def colors(sheet: Image.Image, box: tuple[int, int, int, int]) -> set[object]:
    found = sheet.crop(box).getcolors(1 << 20)
    assert found is not None
    return {color for _, color in found}


def tile_box(column: int, row: int = 0) -> tuple[int, int, int, int]:
    left, top = MARGIN + column * TILE[0], MARGIN + row * TILE[1]
    return (left, top, left + TILE[0], top + TILE[1])


def test_right_is_green_and_wrong_is_red_each_in_its_own_tile(image: Path) -> None:
    sheet = contact_sheet(
        [Tile(image, "what?", "blue", "blue", True), Tile(image, "what?", "red", "blue", False)]
    )
    first, second = colors(sheet, tile_box(0)), colors(sheet, tile_box(1))
    assert RIGHT in first
    assert WRONG not in first
    assert WRONG in second
    assert RIGHT not in second


def test_the_sheet_has_a_row_for_every_so_many_columns(image: Path) -> None:
    tiles = [Tile(image, "what?", "blue", "blue", True)] * 7
    sheet = contact_sheet(tiles, columns=3)
    assert sheet.size == (3 * TILE[0] + MARGIN, MARGIN + 3 * TILE[1])
    assert FILL in colors(sheet, tile_box(0, 2))
    assert FILL not in colors(sheet, tile_box(1, 2))
    titled = contact_sheet(tiles, columns=3, title="easy-VQA")
    assert titled.height > sheet.height
    assert contact_sheet(tiles[:2], columns=6).width == 2 * TILE[0] + MARGIN


def test_a_picture_keeps_its_shape(image: Path) -> None:
    sheet = contact_sheet([Tile(image, "", "", "", True)])
    left, top = MARGIN + MARGIN, MARGIN + MARGIN
    assert sheet.getpixel((left + PICTURE - 2, top + PICTURE // 2 - 2)) == FILL
    assert sheet.getpixel((left + PICTURE - 2, top + PICTURE // 2 + 2)) != FILL


def test_lines_are_folded_between_words_to_the_width() -> None:
    font = ImageFont.load_default(FONT)
    text = "does the image not contain a rectangle or anything else?"
    lines = fold(text, 120, font)
    assert len(lines) > 1
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 120 for line in lines)
    assert fold("", 120, font) == []


def test_a_long_answer_is_cut_with_dots() -> None:
    font = ImageFont.load_default(FONT)
    cut = shorten("one\nanswer that goes on and on and on", 100, font)
    assert cut.startswith("one answer")
    assert cut.endswith("...")
    assert font.getlength(cut) <= 100
    assert shorten("blue", 100, font) == "blue"


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.png"):
        contact_sheet([Tile(tmp_path / "gone.png", "", "", "", True)])


def test_the_file_is_a_png_that_reads_back(image: Path, tmp_path: Path) -> None:
    sheet = contact_sheet([Tile(image, "what is this?", "blue", "blue", True)])
    save_sheet(sheet, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as read:
        assert read.format == "PNG"
        assert read.size == sheet.size
        assert read.convert("RGB").tobytes() == sheet.tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "sheet.png"]
