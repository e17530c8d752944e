"""Stamps as pictures on white: captions, categories and letters to train on and to evaluate on.

align.jsonl has captions and tune.jsonl asks for the category, of training stamps, as messages.
captions.jsonl and categories.jsonl evaluate stamps whose captions are in neither. letters.jsonl
trains on the filled letters, outlines.jsonl evaluates the outlined ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmgraft.demo.draft import Draft, rows_writer
from mmgraft.demo.stamps import (
    SMALLEST,
    SOURCE,
    SYMBOLS,
    Stamp,
    open_stamp,
    read_stamps,
    split_by_phrase,
)
from mmgraft.errors import UsageError

TEST_SHARE = 0.2
"""Of the captions, kept for the test."""

CATEGORY_QUESTION = "what kind of thing is this?"
LETTER_QUESTION = "which letter is this?"
_WORDS = {"naturalforces": "natural forces"}
_LETTER = re.compile(r"symbols/alphabets/english/(filled|outlined)/(?:lower|upper)case/.*")
_OF_LETTER = re.compile(r".*\bletter\s+[“\"']?([A-Za-z])[”\"']?\W*$", re.IGNORECASE)


@dataclass(frozen=True)
class StampSettings:
    """What pictures are made.

    Attributes:
        source: Folder of the stamps.
        size: Side of the pictures in pixels.
        seed: Of the split by caption.
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
    """The stamps of a folder, split by caption.

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
        "align.jsonl": [_told(stamp, "", stamp.caption) for stamp in train],
        "tune.jsonl": [_told(stamp, CATEGORY_QUESTION, category_of(stamp)) for stamp in train],
        "captions.jsonl": [{**_asked(stamp), "answers": [stamp.caption]} for stamp in test],
        "categories.jsonl": [
            {
                **_asked(stamp),
                "question": CATEGORY_QUESTION,
                "options": categories,
                "answer": categories.index(category_of(stamp)),
                "kind": category_of(stamp),
            }
            for stamp in test
        ],
        "letters.jsonl": [_told(one, LETTER_QUESTION, letter) for one, letter in letters["filled"]],
        "outlines.jsonl": [
            {**_asked(one), "question": LETTER_QUESTION, "answer": letter}
            for one, letter in letters["outlined"]
        ],
    }
    rows = {name: of_file for name, of_file in rows.items() if of_file}
    shown = [*things, *(one for of_kind in letters.values() for one, _ in of_kind)]
    return Draft(
        writers={
            "images": lambda folder: _draw(shown, folder, settings.size),
            **{name: rows_writer(of_file) for name, of_file in rows.items()},
        },
        rows={name: len(of_file) for name, of_file in rows.items()},
        notes={"categories": categories},
    )


def category_of(stamp: Stamp) -> str:
    """A stamp's category in words."""
    return _WORDS.get(stamp.category, stamp.category)


def on_white(stamp: Stamp, size: int) -> Image.Image:
    """A stamp in the middle of a white square.

    Raises:
        UsageError: Its file cannot be read.
    """
    picture = open_stamp(stamp)
    scale = size / max(picture.size)
    shape = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(shape, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), "white")
    square.paste(picture, ((size - shape[0]) // 2, (size - shape[1]) // 2), picture)
    return square


def _draw(stamps: Iterable[Stamp], folder: Path, size: int) -> None:
    for stamp in stamps:
        path = folder / f"{stamp.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        on_white(stamp, size).save(path)


def _image(stamp: Stamp) -> str:
    return f"images/{stamp.name}.png"


def _asked(stamp: Stamp) -> dict[str, Any]:
    return {"id": stamp.name, "image": _image(stamp), "group": stamp.caption.lower()}


def _told(stamp: Stamp, question: str, answer: str) -> dict[str, Any]:
    parts: list[dict[str, str]] = [{"type": "image", "image": _image(stamp)}]
    parts += [{"type": "text", "text": question}] if question else []
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"id": stamp.name, "messages": messages}
