"""One picture of what several models answer to the same questions, with true boxes and theirs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mmgraft.data.images import open_image
from mmgraft.evaluation.contact_sheet import (
    BACKGROUND,
    FONT,
    INK,
    LINE,
    MARGIN,
    PALE,
    QUESTION_LINES,
    RIGHT,
    WRONG,
    Font,
    fold,
    shorten,
)
from mmgraft.evaluation.items import Box

PICTURE = 200  # pixels, the longer side; as are all sizes below
WIDTH = PICTURE + 2 * MARGIN
MARK = 9
MODELS = ("#1f77b4", "#e6761e", "#b2387f", "#7a5cc7", "#17a2b8", "#8a6d3b", "#666666")
"""Colours of predicted boxes, by model; the true box is green."""
DASHES = ((7, 5), (3, 3), (12, 4))
"""Pixels of line and gap of predicted boxes, by model; the true box has an unbroken line."""


@dataclass(frozen=True)
class Said:
    """What one model answered.

    Attributes:
        model: Its label; empty where there is one model alone.
        text: The answer.
        right: Whether it is right; None where there is no right or wrong, as of captions.
        box: In pixels of the image, of an answer that is one.
        note: What a box is worth; the sheet says it instead of the box's numbers.
    """

    model: str
    text: str
    right: bool | None = None
    box: Box | None = None
    note: str = ""

    @property
    def line(self) -> str:
        """What the sheet says of it."""
        words = [self.note] if self.note else []
        if self.box is None or not self.note:
            words.append(self.text or "(nothing)")
        return ": ".join([self.model, *words] if self.model else words)


@dataclass(frozen=True)
class Asked:
    """One question with everyone's answers.

    Attributes:
        image: A file, or an opened picture.
        question: Folded into three lines at most.
        truth: The right answer.
        said: By each model, in the same order everywhere.
        box: The true one, in pixels of the image.
    """

    image: Any
    question: str
    truth: str
    said: Sequence[Said]
    box: Box | None = None


def answer_sheet(asked: Sequence[Asked], columns: int = 4) -> Image.Image:
    """Draw the sheet: a right answer has a green tick, a wrong one a red cross.

    Raises:
        UsageError: A picture that cannot be read.
    """
    font = ImageFont.load_default(FONT)
    columns = max(1, min(columns, len(asked)))
    pictures = [_with_boxes(one) for one in asked]
    questions = [_question(one.question, font) for one in asked]
    # As high as the highest picture and the longest question ask for, alike in every row.
    picture = max((one.height for one in pictures), default=0)
    lines = max(map(len, questions), default=0)
    answers = max((len(one.said) for one in asked), default=0)
    height = picture + 2 * MARGIN + (lines + 1 + answers) * LINE + LINE // 2
    rows = -(-len(asked) // columns)
    sheet = Image.new("RGB", (columns * WIDTH + MARGIN, rows * height + MARGIN), BACKGROUND)
    for place, one in enumerate(asked):
        row, column = divmod(place, columns)
        left, top = 2 * MARGIN + column * WIDTH, MARGIN + row * height
        sheet.paste(pictures[place], (left, top))
        below = top + picture + LINE // 2
        _write(ImageDraw.Draw(sheet), font, questions[place], left, below, INK)
        _answers(ImageDraw.Draw(sheet), font, one, left, below + lines * LINE)
    return sheet


def sheet_png(sheet: Image.Image) -> bytes:
    """The sheet as a PNG of few colours."""
    data = io.BytesIO()
    sheet.quantize(256).save(data, format="PNG", optimize=True)
    return data.getvalue()


def _question(text: str, font: Font) -> list[str]:
    lines = fold(text, PICTURE, font)
    if len(lines) > QUESTION_LINES:
        lines[QUESTION_LINES - 1 :] = [" ".join(lines[QUESTION_LINES - 1 :])]
    return [shorten(line, PICTURE, font) for line in lines]


def _write(
    pen: ImageDraw.ImageDraw, font: Font, lines: Sequence[str], left: int, top: int, ink: Any
) -> None:
    for number, line in enumerate(lines):
        pen.text((left, top + number * LINE), line, fill=ink, font=font)


def _answers(pen: ImageDraw.ImageDraw, font: Font, asked: Asked, left: int, top: int) -> None:
    _write(pen, font, [shorten(f"truth: {asked.truth}", PICTURE, font)], left, top, PALE)
    for number, said in enumerate(asked.said):
        y = top + (number + 1) * LINE
        if asked.box is not None:
            _mark_color(pen, left, y, number, said.box is not None)
        elif said.right is not None:
            _mark(pen, left, y, said.right)
        ink = INK if said.right is None else RIGHT if said.right else WRONG
        text = shorten(said.line, PICTURE - MARK - 6, font)
        pen.text((left + MARK + 6, y), text, fill=ink, font=font)


def _with_boxes(asked: Asked) -> Image.Image:
    is_file = isinstance(asked.image, str | Path)
    picture = open_image(asked.image, str(asked.image) if is_file else "a picture of the sheet")
    scale = PICTURE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((size[0], size[1]))
    pen = ImageDraw.Draw(picture)

    def scaled(box: Box) -> tuple[int, int, int, int]:
        x1, y1, x2, y2 = (round(value * scale) for value in box)
        return x1, y1, min(x2, size[0] - 1), min(y2, size[1] - 1)

    predicted = [(number, said.box) for number, said in enumerate(asked.said) if said.box]
    # White below all lines, so that none is lost in the picture, and no line lies below white.
    for box in [asked.box, *(box for _, box in predicted)]:
        if box is not None:
            pen.rectangle(scaled(box), outline=BACKGROUND, width=4)
    if asked.box is not None:
        pen.rectangle(scaled(asked.box), outline=RIGHT, width=2)
    for number, box in predicted:
        _dashed(pen, scaled(box), _color(number), *DASHES[number % len(DASHES)])
    return picture


def _dashed(
    pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: str, line: int, gap: int
) -> None:
    """A box of dashes two pixels wide; each side begins with a dash."""
    x1, y1, x2, y2 = box
    for x in range(x1, x2 + 1, line + gap):
        for y in (y1, max(y1, y2 - 1)):
            pen.rectangle((x, y, min(x + line - 1, x2), min(y + 1, y2)), fill=color)
    for y in range(y1, y2 + 1, line + gap):
        for x in (x1, max(x1, x2 - 1)):
            pen.rectangle((x, y, min(x + 1, x2), min(y + line - 1, y2)), fill=color)


def _color(number: int) -> str:
    return MODELS[number % len(MODELS)]


def _mark_box(left: int, y: int) -> tuple[int, int, int, int]:
    return left, y + 3, left + MARK, y + 3 + MARK


def _mark_color(
    pen: ImageDraw.ImageDraw, left: int, y: int, number: int, well_formed: bool
) -> None:
    """A square in the colour of the model's boxes; an empty, crossed one where there is no box."""
    box = _mark_box(left, y)
    if well_formed:
        pen.rectangle(box, fill=_color(number))
        return
    pen.rectangle(box, outline=_color(number))
    pen.line([box[:2], box[2:]], fill=WRONG)
    pen.line([(box[0], box[3]), (box[2], box[1])], fill=WRONG)


def _mark(pen: ImageDraw.ImageDraw, left: int, y: int, right: bool) -> None:
    """A tick or a cross: the answer's colour alone would not reach everyone."""
    x1, y1, x2, y2 = _mark_box(left, y)
    if right:
        pen.line([(x1, y1 + 5), (x1 + 3, y2), (x2, y1)], fill=RIGHT, width=2)
    else:
        pen.line([(x1, y1), (x2, y2)], fill=WRONG, width=2)
        pen.line([(x1, y2), (x2, y1)], fill=WRONG, width=2)
