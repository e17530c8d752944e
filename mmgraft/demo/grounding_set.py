"""Stamps pasted on photographs, and sentences that refer to them: grounding with exact boxes.

align.jsonl names the stamps of each training picture from left to right, each with its box;
train.jsonl asks for every stamp's box. test.jsonl asks for stamps whose captions no training
picture has, seen.jsonl for stamps of the training on new pictures. All are messages; `box` is in
pixels of the picture.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from mmgraft.demo.draft import Draft, rows_writer
from mmgraft.demo.photographs import backdrop, find_photographs, open_photograph
from mmgraft.demo.stamps import (
    SMALLEST,
    SOURCE,
    SYMBOLS,
    Stamp,
    cut_out,
    read_stamps,
    split_by_phrase,
)
from mmgraft.errors import UsageError
from mmgraft.evaluation.metrics.boxes import format_box
from mmgraft.recipes.evaluation_set import BoxFormat

LONGEST_SIDE = {1: (0.45, 0.7), 2: (0.4, 0.6), 3: (0.3, 0.45), 4: (0.25, 0.4)}
"""Range of a stamp's longer side, as a share of the canvas, by the number of stamps on it."""

TEST_SHARE = 0.2
"""Of the captions, kept for the test."""

_NARROWEST = 1 / 3  # shorter by longer side: a thin box is missed by a pixel
_QUALITY = 92
_TRIES = 200

IntBox = tuple[int, int, int, int]


@dataclass(frozen=True)
class GroundingSettings:
    """What pictures are made.

    Attributes:
        source: Folder of the stamps.
        photos: Folder of photographs; None takes those of installed packages.
        size: Side of the pictures in pixels.
        boxes: How answers write a box.
        stamps: How many on a picture: "2", or "2-4" for two, three or four.
        pictures: To train on.
        test_pictures: Of each of the two test files.
        seed: Of everything that is drawn.
    """

    source: Path = SOURCE
    photos: Path | None = None
    size: int = 160
    boxes: BoxFormat = "unit"
    stamps: str = "2"
    pictures: int = 3000
    test_pictures: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.counts
        if not 1 <= low <= high <= max(LONGEST_SIDE):
            raise _wrong_count(self.stamps)
        if self.boxes not in get_args(BoxFormat):
            raise UsageError(f"--boxes {self.boxes}: choose {', '.join(get_args(BoxFormat))}")
        if self.size < SMALLEST:
            raise UsageError(
                f"--size {self.size}: stamps cannot be told apart; give {SMALLEST} or more"
            )
        if min(self.pictures, self.test_pictures) < 1:
            raise UsageError("--pictures and --test-pictures: give 1 or more")

    @property
    def counts(self) -> tuple[int, int]:
        """Fewest and most stamps on a picture."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.stamps)
        if found is None:
            raise _wrong_count(self.stamps)
        return int(found[1]), int(found[2] or found[1])


def _wrong_count(stamps: str) -> UsageError:
    return UsageError(f"--stamps {stamps}: give 1 to {max(LONGEST_SIDE)}, or a range such as 2-4")


@dataclass(frozen=True)
class Placed:
    """A stamp and where it lies, `(x1, y1, x2, y2)` in pixels."""

    stamp: Stamp
    box: IntBox


@dataclass(frozen=True)
class Layout:
    """One picture before it is drawn.

    Attributes:
        name: Of its file, below the images folder.
        photograph: Its place in the list of photographs.
        placed: Stamps in the order they are asked for; no two boxes overlap.
        seed: Draws the backdrop.
    """

    name: str
    photograph: int
    placed: tuple[Placed, ...]
    seed: str


def draft(settings: GroundingSettings) -> Draft:
    """Lay out all pictures, and say what is to be written.

    Raises:
        UsageError: No stamps or photographs, or settings that cannot be met.
    """
    stamps, cutouts = usable_stamps(settings)
    photographs = find_photographs(settings.photos)
    train, unseen = split_by_phrase(stamps, TEST_SHARE, settings.seed)
    parts = {
        "train": (train, settings.pictures),
        "test": (unseen, settings.test_pictures),
        "seen": (train, settings.test_pictures),
    }
    layouts = {
        split: [
            lay_out(f"{split}/{at}.jpg", of_split, cutouts, len(photographs), settings)
            for at in range(count)
        ]
        for split, (of_split, count) in parts.items()
    }
    rows = {
        "align.jsonl": [caption_row(layout, settings) for layout in layouts["train"]],
        "train.jsonl": [train_row(layout, settings) for layout in layouts["train"]],
        "test.jsonl": [row for layout in layouts["test"] for row in test_rows(layout, settings)],
        "seen.jsonl": [row for layout in layouts["seen"] for row in test_rows(layout, settings)],
    }

    def draw_all(folder: Path) -> None:
        opened = [open_photograph(path) for path in photographs]
        for split, of_split in layouts.items():
            (folder / split).mkdir(parents=True)
            for layout in of_split:
                picture = draw(layout, cutouts, opened[layout.photograph], settings.size)
                picture.save(folder / layout.name, quality=_QUALITY)

    return Draft(
        writers={
            "images": draw_all,
            **{name: rows_writer(of_file) for name, of_file in rows.items()},
        },
        rows={name: len(of_file) for name, of_file in rows.items()},
        notes={
            "stamps": {"train": len(train), "test": len(unseen)},
            "photographs": [path.name for path in photographs],
            "boxes": settings.boxes,
        },
    )


def usable_stamps(settings: GroundingSettings) -> tuple[list[Stamp], dict[str, Image.Image]]:
    """Stamps that a short phrase names and that are cut out, and their pictures by name.

    Raises:
        UsageError: There are too few.
    """
    stamps, cutouts = [], {}
    for stamp in read_stamps(settings.source):
        if stamp.category == SYMBOLS or stamp.phrase is None:
            continue
        picture = cut_out(stamp, settings.size)
        if picture is not None and min(picture.size) >= _NARROWEST * max(picture.size):
            stamps.append(stamp)
            cutouts[stamp.name] = picture
    needed = round((settings.counts[1] + 1) / TEST_SHARE)
    if len({stamp.phrase for stamp in stamps}) < needed:
        raise UsageError(
            f"{len(stamps)} stamps of {settings.source} are cut out and have a short caption, and "
            f"{needed} are needed; give the folder of the whole package with --source"
        )
    return stamps, cutouts


def lay_out(
    name: str,
    stamps: Sequence[Stamp],
    cutouts: dict[str, Image.Image],
    photographs: int,
    settings: GroundingSettings,
) -> Layout:
    """Draw stamps with different phrases and give each a place of its own."""
    seed = f"{settings.seed}/{name}"
    rng = random.Random(seed)
    count = rng.randint(*settings.counts)
    chosen: list[Stamp] = []
    while len(chosen) < count:
        stamp = rng.choice(stamps)
        if stamp.phrase not in {other.phrase for other in chosen}:
            chosen.append(stamp)
    boxes: list[IntBox] = []
    while len(boxes) < count:  # begins again where the last stamps find no room
        boxes = _places([cutouts[stamp.name].size for stamp in chosen], settings.size, rng)
    placed = tuple(Placed(stamp, box) for stamp, box in zip(chosen, boxes, strict=True))
    return Layout(name, rng.randrange(photographs), placed, f"{seed}/backdrop")


def _places(shapes: Sequence[tuple[int, int]], size: int, rng: random.Random) -> list[IntBox]:
    """A box for each shape, or fewer where there is no room."""
    low, high = LONGEST_SIDE[len(shapes)]
    boxes: list[IntBox] = []
    for shape in shapes:
        scale = size * rng.uniform(low, high) / max(shape)
        width, height = (max(1, round(length * scale)) for length in shape)
        for _ in range(_TRIES):
            x, y = rng.randint(0, size - width), rng.randint(0, size - height)
            box = (x, y, x + width, y + height)
            if not any(_overlap(box, other) for other in boxes):
                boxes.append(box)
                break
        else:
            return boxes
    return boxes


def _overlap(one: IntBox, other: IntBox) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def draw(
    layout: Layout, cutouts: dict[str, Image.Image], photograph: Image.Image, size: int
) -> Image.Image:
    """The picture of a layout."""
    picture = backdrop(photograph, size, random.Random(layout.seed))
    for placed in layout.placed:
        x1, y1, x2, y2 = placed.box
        stamp = cutouts[placed.stamp.name].resize((x2 - x1, y2 - y1), Image.Resampling.LANCZOS)
        picture.paste(stamp, (x1, y1), stamp)
    return picture


def question_of(stamp: Stamp) -> str:
    """The sentence that asks for a stamp."""
    return f"where is {stamp.phrase}?"


def caption_row(layout: Layout, settings: GroundingSettings) -> dict[str, Any]:
    """What is in a picture and where, from left to right."""
    ordered = sorted(layout.placed, key=lambda placed: placed.box[0] + placed.box[2])
    told = [f"{placed.stamp.phrase} {_text_of(placed, settings)}" for placed in ordered]
    text = " and ".join(told)
    return {"id": _id(layout), "messages": [_first(layout, ""), _answer(text)]}


def train_row(layout: Layout, settings: GroundingSettings) -> dict[str, Any]:
    """Every stamp of a picture asked for, one after another."""
    messages = []
    for at, placed in enumerate(layout.placed):
        question = question_of(placed.stamp)
        turn = _first(layout, question) if at == 0 else {"role": "user", "content": question}
        messages += [turn, _answer(_text_of(placed, settings))]
    boxes = [list(placed.box) for placed in layout.placed]
    return {"id": _id(layout), "messages": messages, "boxes": boxes}


def test_rows(layout: Layout, settings: GroundingSettings) -> list[dict[str, Any]]:
    """One row for each stamp of a picture, with its box for evaluation."""
    return [
        {
            "id": f"{_id(layout)}-{at}",
            "messages": [
                _first(layout, question_of(placed.stamp)),
                _answer(_text_of(placed, settings)),
            ],
            "box": list(placed.box),
            "kind": placed.stamp.category,
            "group": _id(layout),
        }
        for at, placed in enumerate(layout.placed)
    ]


def _id(layout: Layout) -> str:
    return Path(layout.name).with_suffix("").as_posix().replace("/", "-")


def _first(layout: Layout, question: str) -> dict[str, Any]:
    parts: list[dict[str, str]] = [{"type": "image", "image": f"images/{layout.name}"}]
    parts += [{"type": "text", "text": question}] if question else []
    return {"role": "user", "content": parts}


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _text_of(placed: Placed, settings: GroundingSettings) -> str:
    return format_box(placed.box, settings.boxes, (settings.size, settings.size))
