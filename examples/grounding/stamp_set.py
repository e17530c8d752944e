"""Make images of stamps on white: captions, categories and letters to train and to evaluate on.

    python examples/grounding/stamp_set.py --out stamps

align.jsonl has captions and tune.jsonl asks for the category, of training stamps, as messages.
captions.jsonl and categories.jsonl evaluate stamps whose captions are in neither. letters.jsonl
trains on the filled letters, outlines.jsonl evaluates the outlined ones.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from command import LICENCE_STAMPS, parser, write
from mmgraft.demo.draft import Draft
from mmgraft.errors import UsageError
from stamps import (
    SMALLEST,
    SOURCE,
    SYMBOLS,
    Stamp,
    open_stamp,
    read_stamps,
    split_by_phrase,
)

TEST_SHARE = 0.2
"""Share of the captions that is kept for the test."""

CATEGORY_QUESTION = "what kind of thing is this?"
LETTER_QUESTION = "which letter is this?"
_WORDS = {"naturalforces": "natural forces"}
_LETTER = re.compile(r"symbols/alphabets/english/(filled|outlined)/(?:lower|upper)case/.*")
_OF_LETTER = re.compile(r".*\bletter\s+[“\"']?([A-Za-z])[”\"']?\W*$", re.IGNORECASE)


@dataclass(frozen=True)
class StampSettings:
    """Settings of the set.

    Attributes:
        source: Folder of the stamps.
        size: Side of the images in pixels.
        seed: Seed of the split by caption.
    """

    source: Path = SOURCE
    size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < SMALLEST:
            raise UsageError(
                f"--size {self.size}: stamps cannot be told apart; give {SMALLEST} or more"
            )


def draft(settings: StampSettings) -> Draft:
    """Plan the files of a folder of stamps, split by caption.

    Raises:
        UsageError: There is no such folder, or too few stamps in it.
    """
    stamps = read_stamps(settings.source)
    things = [stamp for stamp in stamps if stamp.category != SYMBOLS]
    train, test = split_by_phrase(things, TEST_SHARE, settings.seed)
    categories = sorted({category_of(stamp) for stamp in things})
    if not test or len(categories) < 2:
        raise UsageError(
            f"{settings.source} has {len(things)} stamps of {len(categories)} categories, which "
            "cannot be split; give the folder of the whole package with --source"
        )
    letters: dict[str, list[tuple[Stamp, str]]] = {"filled": [], "outlined": []}
    for stamp in stamps:
        found, letter = _LETTER.fullmatch(stamp.name), _OF_LETTER.fullmatch(stamp.caption)
        if found and letter:
            letters[found[1]].append((stamp, letter[1].lower()))
    rows = {
        "align.jsonl": [_train_row(stamp, "", stamp.caption) for stamp in train],
        "tune.jsonl": [_train_row(stamp, CATEGORY_QUESTION, category_of(stamp)) for stamp in train],
        "captions.jsonl": [{**_test_row(stamp), "answers": [stamp.caption]} for stamp in test],
        "categories.jsonl": [
            {
                **_test_row(stamp),
                "question": CATEGORY_QUESTION,
                "options": categories,
                "answer": categories.index(category_of(stamp)),
                "kind": category_of(stamp),
            }
            for stamp in test
        ],
        "letters.jsonl": [
            _train_row(one, LETTER_QUESTION, letter) for one, letter in letters["filled"]
        ],
        "outlines.jsonl": [
            {**_test_row(one), "question": LETTER_QUESTION, "answer": letter}
            for one, letter in letters["outlined"]
        ],
    }
    rows = {name: of_file for name, of_file in rows.items() if of_file}
    shown = [*things, *(one for of_kind in letters.values() for one, _ in of_kind)]
    return Draft.of_rows(
        rows, lambda folder: _draw(shown, folder, settings.size), {"categories": categories}
    )


def category_of(stamp: Stamp) -> str:
    """Return a stamp's category in words."""
    return _WORDS.get(stamp.category, stamp.category)


def on_white(stamp: Stamp, size: int) -> Image.Image:
    """Put a stamp in the middle of a white square.

    Raises:
        UsageError: Its file cannot be read.
    """
    image = open_stamp(stamp)
    scale = size / max(image.size)
    shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(shape, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), "white")
    square.paste(image, ((size - shape[0]) // 2, (size - shape[1]) // 2), image)
    return square


def _draw(stamps: Iterable[Stamp], folder: Path, size: int) -> None:
    for stamp in stamps:
        path = folder / f"{stamp.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        on_white(stamp, size).save(path)


def _image(stamp: Stamp) -> str:
    return f"images/{stamp.name}.png"


def _test_row(stamp: Stamp) -> dict[str, Any]:
    return {"id": stamp.name, "image": _image(stamp), "group": stamp.caption.lower()}


def _train_row(stamp: Stamp, question: str, answer: str) -> dict[str, Any]:
    parts: list[dict[str, str]] = [{"type": "image", "image": _image(stamp)}]
    parts += [{"type": "text", "text": question}] if question else []
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"id": stamp.name, "messages": messages}


def main(args: list[str] | None = None) -> int:
    """Make the set as the command line says; return the exit code."""
    options = parser(__doc__, "stamps")
    options.add_argument("--source", type=Path, default=SOURCE, help="folder of the stamps")
    options.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    given = options.parse_args(args)
    return write(
        given,
        lambda: draft(StampSettings(given.source, given.size, given.seed)),
        LICENCE_STAMPS,
    )


if __name__ == "__main__":
    sys.exit(main())
