"""The contact sheet of a set of boxes: where things are, and where a graft says they are.

A sheet stays in its run unless the pictures are known to be free: `results/sheets/` is never
pushed, and the report of the run shows what lies there by a link.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from mmgraft.atomic import atomic_write
from mmgraft.data.content import images_of_all
from mmgraft.errors import UsageError
from mmgraft.evaluation.answer_sheet import Asked, Said, answer_sheet, sheet_png
from mmgraft.evaluation.boxes import THRESHOLD, format_box, iou, parse_box
from mmgraft.evaluation.items import Item
from mmgraft.evaluation.results import FOLDER
from mmgraft.evaluation.set_spec import SetSpec
from mmgraft.evaluation.source_licence import all_free, stated_licences

SHOWN = 12
SEED = 0
AT_HOME = "sheets"
"""Inside the results of a run: sheets whose pictures are not known to be free."""


def drawn_places(items: Sequence[Item], shown: int = SHOWN) -> list[int]:
    """Places of so many items with images, drawn by a fixed seed, whatever was answered."""
    places = [at for at, item in enumerate(items) if item.has_image]
    return sorted(random.Random(SEED).sample(places, min(shown, len(places))))


def said_box(model: str, spec: SetSpec, item: Item, text: str) -> Said:
    """An answer that is to be a box, with its IoU or the word that it is malformed.

    Args:
        model: Who says it.
        spec: The set, of metric `box`.
        item: With its box and the size of its picture.
        text: The answer.

    Raises:
        UsageError: An item without a box; names file and row.
    """
    if item.box is None or item.size is None or spec.boxes is None:
        raise UsageError(f"{item.where}: no box to compare with; name its column")
    box = parse_box(text, spec.boxes, item.size)
    if box is None:
        return Said(model, text, False, None, "malformed")
    overlap = iou(box, item.box)
    return Said(model, text, overlap >= THRESHOLD, box, f"IoU {overlap:.2f}")


def write_box_sheet(
    run: Path, spec: SetSpec, file: Path, items: Sequence[Item], answers: Sequence[str]
) -> str | None:
    """Draw some of a set's items with the true box and the answered one, into the run's results.

    Args:
        run: Its folder.
        spec: The set, of metric `box`.
        file: Of the items, beside which its licence may stand.
        items: All of the set.
        answers: One text an item, in their order.

    Returns:
        The PNG, relative to the run: `results/boxes-SET.png` where every licence is known and free,
        else `results/sheets/SET.png`. None where no item has an image.

    Raises:
        UsageError: A picture that cannot be read.
        MMGraftError: The disk is full; an older sheet stays.
    """
    places = drawn_places(items)
    if not places:
        return None
    png = sheet_png(answer_sheet([_asked(spec, items[at], answers[at]) for at in places]))
    free = f"{FOLDER}/boxes-{spec.name}.png"
    home = f"{FOLDER}/{AT_HOME}/{spec.name}.png"
    is_free = all_free(stated_licences(file, [items[at] for at in places]))
    name, other = (free, home) if is_free else (home, free)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / other).unlink(missing_ok=True)
    atomic_write(run / name, lambda path: _write(path, png))
    return name


def stays_home(sheet: str) -> bool:
    """Whether a sheet's pictures are not to leave the run."""
    return Path(sheet).parent.name == AT_HOME


def _asked(spec: SetSpec, item: Item, text: str) -> Asked:
    said = said_box("", spec, item, text)
    assert item.box is not None and item.size is not None and spec.boxes is not None  # noqa: PT018
    truth = format_box(item.box, spec.boxes, item.size)
    image = next(iter(images_of_all(item.messages)))
    return Asked(image, item.question, truth, [said], item.box)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
