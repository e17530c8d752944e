from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from mmgraft.errors import UsageError
from mmgraft.evaluation.answer_sheet import (
    MODELS,
    PICTURE,
    WIDTH,
    Asked,
    Said,
    answer_sheet,
    sheet_png,
)
from mmgraft.evaluation.contact_sheet import LINE, MARGIN, RIGHT, WRONG

FILL = (200, 200, 60)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (100, 50), FILL).save(tmp_path / "one.png")
    return tmp_path / "one.png"


def colors(sheet: Image.Image) -> set[Any]:
    found = sheet.getcolors(1 << 20)
    assert found is not None
    return {color for _, color in found}


def hex_color(number: int) -> tuple[int, int, int]:
    text = MODELS[number]
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def test_right_answers_are_green_and_wrong_ones_red(image: Path) -> None:
    right = answer_sheet([Asked(image, "what?", "blue", [Said("a", "blue", True)])])
    wrong = answer_sheet([Asked(image, "what?", "blue", [Said("a", "red", False)])])
    neither = answer_sheet([Asked(image, "what?", "blue", [Said("a", "a dog", None)])])
    assert RIGHT in colors(right)
    assert WRONG not in colors(right)
    assert WRONG in colors(wrong)
    assert RIGHT not in colors(wrong)
    assert not {RIGHT, WRONG} & colors(neither)


def test_a_tick_and_a_cross_differ_in_shape_too(image: Path) -> None:
    marks = []
    for right in (True, False):
        sheet = answer_sheet([Asked(image, "?", "x", [Said("a", "b", right)])]).convert("1")
        marks.append(sheet.crop((2 * MARGIN, sheet.height - 2 * MARGIN - LINE, 40, sheet.height)))
    assert ImageChops.logical_xor(*marks).getbbox() is not None


def test_every_answer_has_a_line_and_every_question_a_column(image: Path) -> None:
    one = Asked(image, "what?", "blue", [Said("a", "blue", True)])
    three = Asked(image, "what?", "blue", [Said(name, "blue", True) for name in "abc"])
    assert answer_sheet([three]).height - answer_sheet([one]).height == 2 * LINE
    assert answer_sheet([one] * 3, columns=2).width == 2 * WIDTH + MARGIN
    assert answer_sheet([one]).width == WIDTH + MARGIN
    two_rows = answer_sheet([one] * 3, columns=2).height
    assert two_rows - MARGIN == 2 * (answer_sheet([one] * 2, columns=2).height - MARGIN)


def test_boxes_are_drawn_where_they_are_in_the_colour_of_who_said_them(image: Path) -> None:
    said = [Said("a", "[..]", True, (0, 0, 50, 50)), Said("b", "no box", False)]
    sheet = answer_sheet([Asked(image, "the thing", "[..]", said, box=(20, 10, 80, 40))])
    left, top, scale = 2 * MARGIN, MARGIN, PICTURE / 100
    assert sheet.getpixel((left + int(80 * scale), top + int(20 * scale))) == RIGHT
    assert sheet.getpixel((left + int(50 * scale), top + int(2 * scale))) == hex_color(0)
    assert sheet.getpixel((left + int(90 * scale), top + int(45 * scale))) == FILL
    assert hex_color(1) in colors(sheet)  # its mark, though it drew no box


def test_a_picture_keeps_its_shape_and_may_be_open_already(image: Path) -> None:
    with Image.open(image) as opened:
        sheet = answer_sheet([Asked(opened.convert("RGB"), "?", "x", [])])
    left, top = 2 * MARGIN, MARGIN
    assert sheet.getpixel((left + PICTURE - 2, top + PICTURE // 2 - 2)) == FILL
    assert sheet.getpixel((left + PICTURE - 2, top + PICTURE // 2 + 2)) != FILL


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.png"):
        answer_sheet([Asked(tmp_path / "gone.png", "?", "x", [])])


def test_the_png_reads_back(image: Path) -> None:
    sheet = answer_sheet([Asked(image, "what " * 60, "blue", [Said("a", "", False)])])
    with Image.open(io.BytesIO(sheet_png(sheet))) as read:
        assert read.size == sheet.size
        assert read.format == "PNG"
