from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageFont

from mmgraft.errors import UsageError
from mmgraft.evaluation.report.sheets import (
    CORRECT,
    FONT,
    IMAGE,
    LINE,
    MARGIN,
    MODELS,
    WIDTH,
    WRONG,
    Answer,
    SheetItem,
    _shorten,
    _wrap,
    draw_sheet,
    sheet_png,
)

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
    right = draw_sheet([SheetItem(image, "what?", "blue", [Answer("a", "blue", True)])])
    wrong = draw_sheet([SheetItem(image, "what?", "blue", [Answer("a", "red", False)])])
    neither = draw_sheet([SheetItem(image, "what?", "blue", [Answer("a", "a dog", None)])])
    assert CORRECT in colors(right)
    assert WRONG not in colors(right)
    assert WRONG in colors(wrong)
    assert CORRECT not in colors(wrong)
    assert not {CORRECT, WRONG} & colors(neither)


def test_a_tick_and_a_cross_differ_in_shape_too(image: Path) -> None:
    marks = []
    for right in (True, False):
        sheet = draw_sheet([SheetItem(image, "?", "x", [Answer("a", "b", right)])]).convert("1")
        marks.append(sheet.crop((2 * MARGIN, sheet.height - 2 * MARGIN - LINE, 40, sheet.height)))
    assert ImageChops.logical_xor(*marks).getbbox() is not None


def test_every_answer_has_a_line_and_every_question_a_column(image: Path) -> None:
    one = SheetItem(image, "what?", "blue", [Answer("a", "blue", True)])
    three = SheetItem(image, "what?", "blue", [Answer(name, "blue", True) for name in "abc"])
    assert draw_sheet([three]).height - draw_sheet([one]).height == 2 * LINE
    assert draw_sheet([one] * 3, columns=2).width == 2 * WIDTH + MARGIN
    assert draw_sheet([one]).width == WIDTH + MARGIN
    two_rows = draw_sheet([one] * 3, columns=2).height
    assert two_rows - MARGIN == 2 * (draw_sheet([one] * 2, columns=2).height - MARGIN)


def test_boxes_are_drawn_where_they_are_in_the_colour_of_their_model(image: Path) -> None:
    said = [Answer("a", "[..]", True, (0, 0, 50, 50)), Answer("b", "no box", False)]
    sheet = draw_sheet([SheetItem(image, "the thing", "[..]", said, box=(20, 10, 80, 40))])
    left, top, scale = 2 * MARGIN, MARGIN, IMAGE / 100
    assert sheet.getpixel((left + int(80 * scale), top + int(20 * scale))) == CORRECT
    assert sheet.getpixel((left + int(50 * scale), top + int(2 * scale))) == hex_color(0)
    assert sheet.getpixel((left + int(90 * scale), top + int(45 * scale))) == FILL
    assert hex_color(1) in colors(sheet)  # its mark, though it drew no box


def test_an_image_keeps_its_shape_and_may_be_open_already(image: Path) -> None:
    with Image.open(image) as opened:
        sheet = draw_sheet([SheetItem(opened.convert("RGB"), "?", "x", [])])
    left, top = 2 * MARGIN, MARGIN
    assert sheet.getpixel((left + IMAGE - 2, top + IMAGE // 2 - 2)) == FILL
    assert sheet.getpixel((left + IMAGE - 2, top + IMAGE // 2 + 2)) != FILL


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.png"):
        draw_sheet([SheetItem(tmp_path / "gone.png", "?", "x", [])])


def test_the_png_reads_back(image: Path) -> None:
    sheet = draw_sheet([SheetItem(image, "what " * 60, "blue", [Answer("a", "", False)])])
    with Image.open(io.BytesIO(sheet_png(sheet))) as read:
        assert read.size == sheet.size
        assert read.format == "PNG"


def test_a_title_stands_above_the_rows(image: Path) -> None:
    one = SheetItem(image, "what?", "blue", [Answer("", "blue", True)])
    plain, titled = draw_sheet([one]), draw_sheet([one], title="easy-VQA")
    assert titled.size == (plain.width, plain.height + LINE + MARGIN)
    below = titled.crop((0, LINE + 2 * MARGIN, *titled.size))
    same = plain.crop((0, MARGIN, *plain.size))
    assert ImageChops.difference(below, same).getbbox() is None


def test_a_question_is_wrapped_between_words_into_three_lines_at_most() -> None:
    font = ImageFont.load_default(FONT)
    text = "does the image not contain a rectangle or anything else?"
    lines = _wrap(text, font)
    assert len(lines) == 2
    assert " ".join(lines) == text
    assert _wrap("", font) == []
    lines = _wrap("what " * 60, font)
    assert len(lines) == 3
    assert lines[2].endswith("...")
    assert all(font.getlength(line) <= IMAGE for line in lines)


def test_a_long_answer_is_cut_with_dots() -> None:
    font = ImageFont.load_default(FONT)
    cut = _shorten("one\nanswer that goes on and on and on", 100, font)
    assert cut.startswith("one answer")
    assert cut.endswith("...")
    assert font.getlength(cut) <= 100
    assert _shorten("blue", 100, font) == "blue"
