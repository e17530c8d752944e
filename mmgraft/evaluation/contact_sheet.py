"""One picture of many: test pictures, what was asked, what the model said and what is true."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmgraft.data.images import open_image

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PICTURE = 128  # pixels, as are all sizes below
MARGIN = 12
FONT = 13
LINE = 17
QUESTION_LINES = 3
TILE = (PICTURE + 3 * MARGIN, PICTURE + 2 * MARGIN + (QUESTION_LINES + 2) * LINE)

BACKGROUND, INK, PALE = (255, 255, 255), (30, 30, 30), (110, 110, 110)
RIGHT, WRONG = (20, 125, 50), (190, 30, 30)


@dataclass(frozen=True)
class Tile:
    """One picture of the sheet.

    Attributes:
        image: A file.
        question: Folded into three lines at most.
        answer: What the model said.
        truth: The right answer.
        right: Whether they agree; decides the colour.
    """

    image: str | Path
    question: str
    answer: str
    truth: str
    right: bool


def contact_sheet(tiles: Sequence[Tile], columns: int = 6, title: str = "") -> Image.Image:
    """Draw the sheet; right answers are green, wrong ones red with the truth beside them.

    Raises:
        UsageError: A picture that cannot be read.
    """
    font = ImageFont.load_default(FONT)
    columns = max(1, min(columns, len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    top = MARGIN + (LINE + MARGIN if title else 0)
    size = (columns * TILE[0] + MARGIN, top + rows * TILE[1])
    sheet = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((2 * MARGIN, MARGIN), title, fill=INK, font=ImageFont.load_default(FONT + 2))
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        _draw(sheet, pen, font, tile, MARGIN + column * TILE[0], top + row * TILE[1])
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG in one step.

    Raises:
        MMGraftError: The disk is full or cannot be written to.
    """
    from mmgraft.atomic import atomic_write

    data = io.BytesIO()
    sheet.save(data, format="PNG", optimize=True)
    atomic_write(path, lambda temporary: _write(temporary, data.getvalue()))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _draw(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, font: Font, tile: Tile, left: int, top: int
) -> None:
    picture = open_image(tile.image, str(tile.image))
    scale = PICTURE / max(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    sheet.paste(picture, (left + MARGIN, top + MARGIN))
    width = TILE[0] - 2 * MARGIN
    y = top + PICTURE + MARGIN + LINE // 2
    for line in fold(tile.question, width, font)[:QUESTION_LINES]:
        pen.text((left + MARGIN, y), line, fill=INK, font=font)
        y += LINE
    color = RIGHT if tile.right else WRONG
    said = shorten(tile.answer or "(nothing)", width, font)
    pen.text((left + MARGIN, y), said, fill=color, font=font)
    if not tile.right:
        pen.text((left + MARGIN, y + LINE), f"truth: {tile.truth}", fill=PALE, font=font)


def fold(text: str, width: float, font: Font) -> list[str]:
    """Break a text between words into lines of at most `width` pixels; a longer word overhangs."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def shorten(text: str, width: float, font: Font) -> str:
    """A text in one line, cut to `width` pixels with three dots where it is longer."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
