"""Paste stamps on photographs and ask for them by caption: grounding with exact boxes.

    python examples/grounding/grounding_set.py --out stamps-grounding --stamps 1 --boxes ten

align.jsonl names the stamps of each training image from left to right, each with its box;
train.jsonl asks for every stamp's box. test.jsonl asks for stamps whose captions no training image
has, seen.jsonl for stamps of the training on new images. All are messages; ``box`` is in pixels of
the image.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from command import LICENCE_GROUNDING, parser, write
from mmgraft.demo.draft import Draft
from mmgraft.errors import UsageError
from mmgraft.evaluation.metrics.boxes import format_box
from mmgraft.recipes.evaluation_set import BoxFormat
from photographs import backdrop, find_photographs, open_photograph
from stamps import (
    SMALLEST,
    SOURCE,
    SYMBOLS,
    Stamp,
    cut_out,
    read_stamps,
    split_by_phrase,
)

LONGEST_SIDE = {1: (0.45, 0.7), 2: (0.4, 0.6), 3: (0.3, 0.45), 4: (0.25, 0.4)}
"""Range of a stamp's longer side, as a share of the canvas, by the number of stamps on it."""

TEST_SHARE = 0.2
"""Share of the captions that are kept for the test."""

_NARROWEST = 1 / 3  # shorter by longer side: a thin box is missed by a pixel
_QUALITY = 92
_TRIES = 200

IntBox = tuple[int, int, int, int]


@dataclass(frozen=True)
class GroundingSettings:
    """Settings of the set.

    Attributes:
        source: Folder of the stamps.
        photos: Folder of photographs; None takes those of installed packages.
        size: Side of the images in pixels.
        boxes: Format of boxes in answers.
        stamps: Number of stamps on an image: "2", or "2-4" for two, three or four.
        images: Number of images to train on.
        test_images: Number of images in each of the two test files.
        seed: Seed of everything that is chosen.
    """

    source: Path = SOURCE
    photos: Path | None = None
    size: int = 160
    boxes: BoxFormat = "unit"
    stamps: str = "2"
    images: int = 3000
    test_images: int = 250
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
        if min(self.images, self.test_images) < 1:
            raise UsageError("--images and --test-images: give 1 or more")

    @property
    def counts(self) -> tuple[int, int]:
        """Fewest and most stamps on an image."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.stamps)
        if found is None:
            raise _wrong_count(self.stamps)
        return int(found[1]), int(found[2] or found[1])


def _wrong_count(stamps: str) -> UsageError:
    return UsageError(f"--stamps {stamps}: give 1 to {max(LONGEST_SIDE)}, or a range such as 2-4")


@dataclass(frozen=True)
class Placed:
    """A stamp and its box, ``(x1, y1, x2, y2)`` in pixels."""

    stamp: Stamp
    box: IntBox


@dataclass(frozen=True)
class Layout:
    """One image before it is made.

    Attributes:
        name: Name of its file, below the images folder.
        photograph: Index in the list of photographs.
        placed: Stamps in the order of the questions; no two boxes overlap.
        seed: Seed of the backdrop.
    """

    name: str
    photograph: int
    placed: tuple[Placed, ...]
    seed: str


def draft(settings: GroundingSettings) -> Draft:
    """Lay out all images, and plan the files.

    Raises:
        UsageError: No stamps or photographs, or settings that cannot be met.
    """
    stamps, cutouts = usable_stamps(settings)
    photographs = find_photographs(settings.photos)
    train, unseen = split_by_phrase(stamps, TEST_SHARE, settings.seed)
    parts = {
        "train": (train, settings.images),
        "test": (unseen, settings.test_images),
        "seen": (train, settings.test_images),
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
        "test.jsonl": [row for layout in layouts["test"] for row in rows_of_test(layout, settings)],
        "seen.jsonl": [row for layout in layouts["seen"] for row in rows_of_test(layout, settings)],
    }

    def draw_all(folder: Path) -> None:
        opened = [open_photograph(path) for path in photographs]
        for split, of_split in layouts.items():
            (folder / split).mkdir(parents=True)
            for layout in of_split:
                image = draw(layout, cutouts, opened[layout.photograph], settings.size)
                image.save(folder / layout.name, quality=_QUALITY)

    notes = {
        "stamps": {"train": len(train), "test": len(unseen)},
        "photographs": [path.name for path in photographs],
        "boxes": settings.boxes,
    }
    return Draft.of_rows(rows, draw_all, notes)


def usable_stamps(settings: GroundingSettings) -> tuple[list[Stamp], dict[str, Image.Image]]:
    """Return stamps that a short phrase names and that are cut out, and their images by name.

    Raises:
        UsageError: There are too few.
    """
    stamps, cutouts = [], {}
    for stamp in read_stamps(settings.source):
        if stamp.category == SYMBOLS or stamp.phrase is None:
            continue
        image = cut_out(stamp, settings.size)
        if image is not None and min(image.size) >= _NARROWEST * max(image.size):
            stamps.append(stamp)
            cutouts[stamp.name] = image
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
    """Choose stamps with different phrases and give each a box of its own."""
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
        boxes = _boxes([cutouts[stamp.name].size for stamp in chosen], settings.size, rng)
    placed = tuple(Placed(stamp, box) for stamp, box in zip(chosen, boxes, strict=True))
    return Layout(name, rng.randrange(photographs), placed, f"{seed}/backdrop")


def _boxes(shapes: Sequence[tuple[int, int]], size: int, rng: random.Random) -> list[IntBox]:
    """Return a box for each shape, or fewer where there is no room."""
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
    """Make the image of a layout."""
    image = backdrop(photograph, size, random.Random(layout.seed))
    for placed in layout.placed:
        x1, y1, x2, y2 = placed.box
        stamp = cutouts[placed.stamp.name].resize((x2 - x1, y2 - y1), Image.Resampling.LANCZOS)
        image.paste(stamp, (x1, y1), stamp)
    return image


def question_of(stamp: Stamp) -> str:
    """Return the sentence that asks for a stamp."""
    return f"where is {stamp.phrase}?"


def caption_row(layout: Layout, settings: GroundingSettings) -> dict[str, Any]:
    """Return the row that names what is in an image and where, from left to right."""
    ordered = sorted(layout.placed, key=lambda placed: placed.box[0] + placed.box[2])
    text = " and ".join(f"{one.stamp.phrase} {_text_of(one, settings)}" for one in ordered)
    return {"id": _id(layout), "messages": [_first(layout, ""), _answer(text)]}


def train_row(layout: Layout, settings: GroundingSettings) -> dict[str, Any]:
    """Return the row that asks for every stamp of an image, one after another."""
    messages = []
    for at, placed in enumerate(layout.placed):
        question = question_of(placed.stamp)
        turn = _first(layout, question) if at == 0 else {"role": "user", "content": question}
        messages += [turn, _answer(_text_of(placed, settings))]
    boxes = [list(placed.box) for placed in layout.placed]
    return {"id": _id(layout), "messages": messages, "boxes": boxes}


def rows_of_test(layout: Layout, settings: GroundingSettings) -> list[dict[str, Any]]:
    """Return one row for each stamp of an image, with its box for evaluation."""
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


def main(args: list[str] | None = None) -> int:
    """Make the set as the command line says; return the exit code."""
    options = parser(__doc__, "stamps-grounding")
    defaults = GroundingSettings()
    for name, kind, text in (
        ("source", Path, "folder of the stamps"),
        ("photos", Path, "folder of photographs; default: those of installed packages"),
        ("size", int, "side of the images in pixels"),
        ("boxes", str, "format of boxes: unit, thousand, ten or pixel"),
        ("stamps", str, "number of stamps on an image: 2, or 2-4"),
        ("images", int, "number of images to train on"),
        ("test-images", int, "number of images in each of the two test files"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        options.add_argument(f"--{name}", type=kind, default=default, help=text)
    given = options.parse_args(args)
    names = [field.name for field in fields(GroundingSettings)]
    return write(
        given,
        lambda: draft(GroundingSettings(**{name: getattr(given, name) for name in names})),
        LICENCE_GROUNDING,
    )


if __name__ == "__main__":
    sys.exit(main())
