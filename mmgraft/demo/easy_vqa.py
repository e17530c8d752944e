"""easy-VQA as rows: 5,000 drawn pictures, each of one shape in one colour, and their questions.

The pictures, questions, answers and the split are the published ones (PyPI easy-vqa, MIT licence);
the package's own code is not used.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from mmgraft.demo.assets import PICTURES, require
from mmgraft.errors import MMGraftError

Split = Literal["train", "test"]

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
_NEGATIONS = frozenset({"no", "not"})


@dataclass(frozen=True)
class Question:
    """One question of the published set.

    Attributes:
        text: Such as "is there a blue shape?".
        answer: One word.
        picture: Its number within the split.
        split: `train` or `test`.
    """

    text: str
    answer: str
    picture: int
    split: Split

    @property
    def image(self) -> str:
        """The picture's file, from the data set's folder."""
        return f"{self.split}/images/{self.picture}.png"

    @property
    def kind(self) -> str:
        """`yes/no`, `shape` or `color`, by its answer."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "shape" if self.answer in SHAPES else "color"


def folder() -> Path:
    """Where the data lie.

    Raises:
        UsageError: The package is missing; the message has the line that installs it.
    """
    require([PICTURES])
    found = PICTURES.folder
    assert found is not None
    return found / "data"


def questions(split: Split) -> list[Question]:
    """All questions of a split, in their published order.

    Raises:
        UsageError: The package is missing.
        MMGraftError: Its file cannot be read.
    """
    path = folder() / split / "questions.json"
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return [Question(str(text), str(answer), int(at), split) for text, answer, at in records]
    except (OSError, ValueError) as error:
        raise MMGraftError(
            f"{path} cannot be read ({error}); install {PICTURES.name} again"
        ) from error


def draw(found: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Some of the questions, each at most once: always the same for the same seed."""
    return random.Random(seed).sample(list(found), min(count, len(found)))


def pictures(found: Iterable[Question]) -> dict[int, list[Question]]:
    """The questions of each picture, pictures in order."""
    by_picture: dict[int, list[Question]] = defaultdict(list)
    for question in found:
        by_picture[question.picture].append(question)
    return dict(sorted(by_picture.items()))


def facts(asked: Iterable[Question]) -> dict[str, str]:
    """What questions and their answers tell of one picture: its `color`, its `shape`, or both.

    "is there a blue shape?" with "yes" tells the colour, and so does "is there not a blue shape?"
    with "no". Nothing but the published answers is used.
    """
    known: dict[str, str] = {}
    for question in asked:
        words = question.text.rstrip("?").split()
        if question.answer in ("yes", "no"):
            denied = not _NEGATIONS.isdisjoint(words)
            if (question.answer == "yes") == denied:
                continue
        for word in (*words, question.answer):
            if word in COLORS:
                known["color"] = word
            elif word in SHAPES:
                known["shape"] = word
    return known


def caption(known: Mapping[str, str]) -> str | None:
    """Such as "a blue rectangle"; None where colour or shape is not known."""
    if "color" not in known or "shape" not in known:
        return None
    return f"a {known['color']} {known['shape']}"


def caption_rows(found: Iterable[Question]) -> list[dict[str, Any]]:
    """One row a picture, its caption made of what its questions tell."""
    rows = []
    for number, asked in pictures(found).items():
        text = caption(facts(asked))
        if text is not None:
            rows.append(_row(f"caption-{number}", asked[0].image, [("", text)]))
    return rows


def question_rows(
    found: Iterable[Question],
    turns: int,
    rounds: int = 1,
    seed: int = 0,
    balanced: bool = False,
) -> list[dict[str, Any]]:
    """Rows of several questions about one picture.

    Half of a row's questions ask for a shape or a colour where there are so many (they are a
    quarter of the set, and one of them says more than a yes). Questions and their order are drawn
    anew in every round.

    Args:
        found: Of one split.
        turns: Questions in a row, at most.
        rounds: Rows a picture.
        seed: Of the draw.
        balanced: Of the yes/no questions take first one whose answer is the rarer one to its
            words, then others by turns. Without it, answering as most pictures would have it is
            right for five of six.
    """
    rng = random.Random(seed)
    found = list(found)
    by_picture = pictures(found)
    usual = _usual_answers(found) if balanced else None
    rows = []
    for again in range(rounds):
        for number, asked in by_picture.items():
            chosen = _choose(asked, turns, rng, usual)
            pairs = [(question.text, question.answer) for question in chosen]
            rows.append(_row(f"questions-{number}-{again}", chosen[0].image, pairs))
    return rows


def prompt(question: Question, root: Path | None = None) -> list[dict[str, Any]]:
    """A question as the conversation that a model is asked to go on with.

    Args:
        question: Any.
        root: The data set's folder, put before the picture's path.
    """
    image = question.image if root is None else str(root / question.image)
    return _messages(image, [(question.text, None)])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as messages jsonl."""
    from mmgraft.atomic import atomic_text

    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    atomic_text(path, "\n".join(lines) + "\n")


def _usual_answers(found: Iterable[Question]) -> dict[str, str]:
    """The more frequent answer to each yes/no question."""
    yes: Counter[str] = Counter()
    for question in found:
        if question.kind == "yes/no":
            yes[question.text] += 1 if question.answer == "yes" else -1
    return {text: "yes" if more > 0 else "no" for text, more in yes.items()}


def _choose(
    asked: Sequence[Question], turns: int, rng: random.Random, usual: Mapping[str, str] | None
) -> list[Question]:
    shuffled = rng.sample(list(asked), len(asked))
    telling = [question for question in shuffled if question.kind != "yes/no"]
    yes_no = [question for question in shuffled if question.kind == "yes/no"]
    size = min(turns, len(shuffled))
    if usual is None:
        count = min(len(telling), max(round(size / 2), size - len(yes_no)))
        return rng.sample([*telling[:count], *yes_no[: size - count]], size)
    count = min(len(telling), max(size // 2, size - len(yes_no)))
    rare = [question for question in yes_no if usual[question.text] != question.answer]
    others = [question for question in yes_no if usual[question.text] == question.answer]
    mixed = [one for pair in zip_longest(rare, others) for one in pair if one is not None]
    return rng.sample([*mixed[: size - count], *telling[:count]], size)


def _row(name: str, image: str, pairs: Sequence[tuple[str, str | None]]) -> dict[str, Any]:
    return {"id": name, "messages": _messages(image, pairs)}


def _messages(image: str, pairs: Sequence[tuple[str, str | None]]) -> list[dict[str, Any]]:
    """The image stands before the first question; an answer of None is left to be given."""
    messages: list[dict[str, Any]] = []
    for place, (text, answer) in enumerate(pairs):
        parts = [{"type": "text", "text": text}] if text else []
        if place == 0:
            parts.insert(0, {"type": "image", "image": image})
        messages.append({"role": "user", "content": parts if place == 0 else text})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages
