"""Contact sheets: images with a question, the true answer and what one or more models answered.

A sheet of boxes stays in its run unless the licences of its images are known to be free:
``results/sheets/`` is never pushed, and the run's report links to the files in it.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mmgraft.atomic import atomic_bytes
from mmgraft.data.chat.turns import images_of_all
from mmgraft.data.images import open_image
from mmgraft.evaluation.items.files import sampled
from mmgraft.evaluation.items.item import Box, Item
from mmgraft.evaluation.items.source_licence import FREE, stated_licences
from mmgraft.evaluation.metrics.boxes import THRESHOLD, format_box, iou, parse_box
from mmgraft.evaluation.metrics.scoring import box_and_size
from mmgraft.frozen import Frozen
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import FOLDER

#: Number of items on a sheet.
SHOWN = 12
SEED = 0
#: Folder in a run's results for sheets whose images are not known to be free.
PRIVATE = "sheets"

IMAGE = 200  # pixels of the longer side; all sizes below are pixels, too
MARGIN = 12
WIDTH = IMAGE + 2 * MARGIN
FONT, LINE = 13, 17
QUESTION_LINES = 3
MARK = 9
BACKGROUND, INK, PALE = (255, 255, 255), (30, 30, 30), (110, 110, 110)
CORRECT, WRONG = (20, 125, 50), (190, 30, 30)
#: Colours of predicted boxes, by model; the true box is green.
MODELS = ("#1f77b4", "#e6761e", "#b2387f", "#7a5cc7", "#17a2b8", "#8a6d3b", "#666666")
#: Lengths of dash and gap of predicted boxes, by model; the true box has a solid line.
DASHES = ((7, 5), (3, 3), (12, 4))

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_Corners = tuple[int, int, int, int]


class Answer(Frozen):
    """Answers of one model.

    Attributes:
        model: Name of the model; empty where there is one alone.
        text: The answer.
        correct: Whether it is correct; None where nothing is, as with captions.
        box: The answered box in pixels of the image.
        note: What a box is worth; the sheet shows it instead of the box's numbers.
    """

    model: str
    text: str
    correct: bool | None = None
    box: Box | None = None
    note: str = ""

    @property
    def line(self) -> str:
        """Return what the sheet writes."""
        text = "" if self.note and self.box else self.text or "(nothing)"
        return ": ".join(filter(None, [self.model, self.note, text]))


class SheetItem(Frozen):
    """One question with the answers of all models.

    Attributes:
        image: A file, or an image already open.
        question: Wrapped into three lines at most.
        truth: The right answer.
        answers: One a model, in the same order in all questions.
        box: The true box in pixels of the image.
    """

    image: Any
    question: str
    truth: str
    answers: Sequence[Answer]
    box: Box | None = None


def draw_sheet(items: Sequence[SheetItem], columns: int = 4, title: str = "") -> Image.Image:
    """Draw a sheet; a correct answer has a green tick, a wrong one a red cross.

    Raises:
        UsageError: An image cannot be read.
    """
    font = ImageFont.load_default(FONT)
    columns = max(1, min(columns, len(items)))
    images = [_with_boxes(one) for one in items]
    texts = [_wrap(one.question, font) for one in items]
    # All rows are as high as the highest image and the longest question need.
    text_at = LINE // 2 + max((one.height for one in images), default=0)
    answers_at = text_at + LINE * max(map(len, texts), default=0)
    answers = max((len(one.answers) for one in items), default=0)
    height = answers_at + (1 + answers) * LINE + 2 * MARGIN
    above = MARGIN + (LINE + MARGIN if title else 0)
    size = columns * WIDTH + MARGIN, above + -(-len(items) // columns) * height
    sheet = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((2 * MARGIN, MARGIN), title, fill=INK, font=ImageFont.load_default(FONT + 2))
    for number, (item, image, text) in enumerate(zip(items, images, texts, strict=True)):
        row, column = divmod(number, columns)
        left, top = 2 * MARGIN + column * WIDTH, above + row * height
        sheet.paste(image, (left, top))
        for line, words in enumerate(text):
            pen.text((left, top + text_at + line * LINE), words, fill=INK, font=font)
        _write_answers(pen, font, item, left, top + answers_at)
    return sheet


def sheet_png(sheet: Image.Image) -> bytes:
    """Return a sheet as a PNG of at most 256 colours."""
    data = io.BytesIO()
    sheet.quantize(256).save(data, format="PNG", optimize=True)
    return data.getvalue()


def sampled_indices(items: Sequence[Item]) -> Sequence[int]:
    """Return indices of items with images, sampled by a fixed seed, whatever was answered."""
    return sampled([at for at, item in enumerate(items) if item.has_image], SHOWN, SEED)


def first_image(item: Item) -> Any:
    """Return the first image of an item."""
    return next(iter(images_of_all(item.messages)))


def box_answer(model: str, spec: SetSpec, item: Item, text: str) -> Answer:
    """Return an answer that should be a box with its IoU, or with the word ``malformed``.

    Args:
        model: Name of the model.
        spec: The set, of metric ``box``.
        item: The item, with its box and the size of its image.
        text: The answer.

    Raises:
        UsageError: An item without a box; names file and row.
    """
    truth, size = box_and_size(item)
    box = parse_box(text, spec.boxes or "unit", size)
    if box is None:
        return Answer(model, text, False, None, "malformed")
    overlap = iou(box, truth)
    return Answer(model, text, overlap >= THRESHOLD, box, f"IoU {overlap:.2f}")


def write_box_sheet(
    run: Path, spec: SetSpec, file: Path, items: Sequence[Item], answers: Sequence[str]
) -> str | None:
    """Draw some of a set's items with the true box and the predicted one, into the run's results.

    Args:
        run: The run's folder.
        spec: The set, of metric ``box``.
        file: File of the items, beside which their licence may be stated.
        items: All items of the set.
        answers: One text an item, in their order.

    Returns:
        The PNG, relative to the run: ``results/boxes-SET.png`` where every licence is known and
        free, else ``results/sheets/SET.png``. None where no item has an image.

    Raises:
        UsageError: An image cannot be read.
        MMGraftError: The disk is full; an older sheet stays.
    """
    shown = sampled_indices(items)
    if not shown:
        return None
    shown_items = [_box_item(spec, items[index], answers[index]) for index in shown]
    public = f"{FOLDER}/boxes-{spec.name}.png"
    private = f"{FOLDER}/{PRIVATE}/{spec.name}.png"
    is_free = stated_licences(file, [items[index] for index in shown]) <= FREE
    name, other = (public, private) if is_free else (private, public)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / other).unlink(missing_ok=True)
    atomic_bytes(run / name, sheet_png(draw_sheet(shown_items)))
    return name


def is_private(sheet: str) -> bool:
    """Return whether a sheet's images have to stay in the run."""
    return Path(sheet).parent.name == PRIVATE


def _box_item(spec: SetSpec, item: Item, text: str) -> SheetItem:
    answer = box_answer("", spec, item, text)
    truth, size = box_and_size(item)
    text = format_box(truth, spec.boxes or "unit", size)
    return SheetItem(first_image(item), item.question, text, [answer], truth)


def _wrap(text: str, font: _Font) -> list[str]:
    """Break a text between words into lines of an image's width; cut what is longer."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and (font.getlength(longer) <= IMAGE or len(lines) == QUESTION_LINES):
            lines[-1] = longer
        else:
            lines.append(word)
    return [_shorten(line, IMAGE, font) for line in lines]


def _shorten(text: str, width: float, font: _Font) -> str:
    """Return a text in one line, cut to ``width`` with three dots where it is longer."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _write_answers(
    pen: ImageDraw.ImageDraw, font: _Font, item: SheetItem, left: int, top: int
) -> None:
    truth = _shorten(f"truth: {item.truth}", IMAGE, font)
    pen.text((left, top), truth, fill=PALE, font=font)
    for number, answer in enumerate(item.answers):
        y = top + (number + 1) * LINE
        corners = (left, y + 3, left + MARK, y + 3 + MARK)
        if item.box is not None or answer.correct is not None:
            _mark(pen, corners, answer, _color(number) if item.box else None)
        ink = {None: INK, True: CORRECT, False: WRONG}[answer.correct]
        text = _shorten(answer.line, IMAGE - MARK - 6, font)
        pen.text((left + MARK + 6, y), text, fill=ink, font=font)


def _with_boxes(item: SheetItem) -> Image.Image:
    is_file = isinstance(item.image, str | Path)
    image = open_image(item.image, str(item.image) if is_file else "an image of the sheet")
    scale = IMAGE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height))
    pen = ImageDraw.Draw(image)

    def scaled(box: Box) -> _Corners:
        x1, y1, x2, y2 = (round(value * scale) for value in box)
        return x1, y1, min(x2, width - 1), min(y2, height - 1)

    predicted = [(number, one.box) for number, one in enumerate(item.answers) if one.box]
    # White below all lines, so that none is lost in the image, and no line is below white.
    for box in [item.box, *(box for _, box in predicted)]:
        if box is not None:
            pen.rectangle(scaled(box), outline=BACKGROUND, width=4)
    if item.box is not None:
        pen.rectangle(scaled(item.box), outline=CORRECT, width=2)
    for number, box in predicted:
        _draw_dashed(pen, scaled(box), _color(number), *DASHES[number % len(DASHES)])
    return image


def _draw_dashed(pen: ImageDraw.ImageDraw, box: _Corners, color: str, dash: int, gap: int) -> None:
    """Draw a box of dashes two pixels wide; each side starts with a dash."""
    x1, y1, x2, y2 = box
    for x in range(x1, x2 + 1, dash + gap):
        for y in (y1, max(y1, y2 - 1)):
            pen.rectangle((x, y, min(x + dash - 1, x2), min(y + 1, y2)), fill=color)
    for y in range(y1, y2 + 1, dash + gap):
        for x in (x1, max(x1, x2 - 1)):
            pen.rectangle((x, y, min(x + 1, x2), min(y + dash - 1, y2)), fill=color)


def _color(number: int) -> str:
    return MODELS[number % len(MODELS)]


def _mark(pen: ImageDraw.ImageDraw, corners: _Corners, answer: Answer, color: str | None) -> None:
    """Draw a tick or a cross, because not everyone sees the colour of an answer's text.

    With a ``color``, which marks the model's boxes, draw a square of it, crossed where the answer
    is no box.
    """
    x1, y1, x2, y2 = corners
    if color is not None:
        pen.rectangle(corners, fill=color if answer.box else None, outline=color)
    if color is None and answer.correct:
        pen.line([(x1, y1 + 5), (x1 + 3, y2), (x2, y1)], fill=CORRECT, width=2)
    elif color is None or answer.box is None:
        for line in ([(x1, y1), (x2, y2)], [(x1, y2), (x2, y1)]):
            pen.line(line, fill=WRONG, width=1 if color else 2)
