"""easy-VQA as files to train on and to evaluate on.

align.jsonl has captions and tune.jsonl several questions a picture, both of the training pictures,
as messages: what the demo's recipes train on. train.jsonl and test.jsonl have one question a row,
which evaluation asks, and from which it takes the most frequent answers; `options` has all answers
to questions of that kind, so that it can be asked as multiple choice too.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from mmgraft.demo import easy_vqa
from mmgraft.demo.draft import Draft, rows_writer
from mmgraft.demo.easy_vqa import Question, Split

TURNS = 5
"""Questions about one picture in a row of tune.jsonl."""


def draft(seed: int = 0) -> Draft:
    """The published set, its two splits kept apart.

    Args:
        seed: Of the draw of questions for tune.jsonl.

    Raises:
        UsageError: The package is missing; the message has the line that installs it.
        MMGraftError: Its file cannot be read.
    """
    root = easy_vqa.folder()
    train, test = easy_vqa.questions("train"), easy_vqa.questions("test")
    rows = {
        "align.jsonl": _moved(easy_vqa.caption_rows(train)),
        "tune.jsonl": _moved(easy_vqa.question_rows(train, TURNS, seed=seed, balanced=True)),
        "train.jsonl": single_rows(train),
        "test.jsonl": single_rows(test),
    }
    return Draft(
        writers={
            "images": lambda path: _copy_images(root, path),
            **{name: rows_writer(of_file) for name, of_file in rows.items()},
        },
        rows={name: len(of_file) for name, of_file in rows.items()},
    )


def single_rows(found: Iterable[Question]) -> list[dict[str, Any]]:
    """One question a row, in the published order; rows of one picture are of one group."""
    found = list(found)
    options: dict[str, set[str]] = {}
    for question in found:
        options.setdefault(question.kind, set()).add(question.answer)
    count: Counter[int] = Counter()
    rows = []
    for question in found:
        number = count[question.picture]
        count[question.picture] += 1
        row: dict[str, Any] = {
            "id": f"{question.split}-{question.picture}-{number}",
            "image": _place(question.image),
            "question": question.text,
            "answer": question.answer,
            "kind": question.kind,
            "group": f"{question.split}-{question.picture}",
        }
        if len(options[question.kind]) > 1:
            row["options"] = sorted(options[question.kind])
        rows.append(row)
    return rows


def _place(image: str) -> str:
    """`train/images/0.png` of the package is `images/train/0.png` here."""
    split, _, name = image.split("/")
    return f"images/{split}/{name}"


def _moved(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        image = row["messages"][0]["content"][0]
        image["image"] = _place(image["image"])
    return rows


def _copy_images(root: Path, path: Path) -> None:
    for split in get_args(Split):
        shutil.copytree(root / split / "images", path / split)
