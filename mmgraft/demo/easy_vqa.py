"""easy-VQA as rows: 5,000 drawn images, each of one shape in one colour, and their questions.

The images, questions, answers and the split are the published ones (PyPI easy-vqa, MIT licence);
the package's own code is not used.

``mmgraft data prepare easy-vqa`` writes align.jsonl (captions) and tune.jsonl (several questions an
image), both of the training images, as messages: what the demo's recipes train on. train.jsonl and
test.jsonl have one question a row, for evaluation and its priors; ``options`` has all answers to
questions of that kind, so that they serve as multiple choice too.
"""

import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

from mmgraft.demo.assets import EASY_VQA, require
from mmgraft.demo.draft import Draft
from mmgraft.errors import MMGraftError
from mmgraft.frozen import Frozen

Split = Literal["train", "test"]

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
#: Number of questions about one image in a row to train on.
TURNS = 5

_NEGATIONS = frozenset({"no", "not"})


class Question(Frozen):
    """One question of the published set.

    Attributes:
        text: Such as "is there a blue shape?".
        answer: One word.
        number: Number of its image within the split.
        split: ``train`` or ``test``.
    """

    text: str
    answer: str
    number: int
    split: Split

    @property
    def image(self) -> str:
        """The image's file, from the data set's folder."""
        return f"{self.split}/images/{self.number}.png"

    @property
    def kind(self) -> str:
        """``yes/no``, ``shape`` or ``color``, by its answer."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "shape" if self.answer in SHAPES else "color"


def folder() -> Path:
    """Return the folder of the data.

    Raises:
        UsageError: The package is missing; the message has the line that installs it.
    """
    require([EASY_VQA])
    found = EASY_VQA.folder
    assert found is not None
    return found / "data"


def questions(split: Split) -> list[Question]:
    """Return all questions of a split, in their published order.

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
            f"{path} cannot be read ({error}); install {EASY_VQA.name} again"
        ) from error


def draw(found: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Return some of the questions, each at most once: always the same for the same seed."""
    return random.Random(seed).sample(list(found), min(count, len(found)))


def by_image(found: Iterable[Question]) -> dict[int, list[Question]]:
    """Return the questions about each image, images in order."""
    grouped: dict[int, list[Question]] = defaultdict(list)
    for question in found:
        grouped[question.number].append(question)
    return dict(sorted(grouped.items()))


def facts(found: Iterable[Question]) -> dict[str, str]:
    """Return the ``color`` and ``shape`` of one image, as far as its questions give them.

    "is there a blue shape?" with "yes" gives the colour, and so does "is there not a blue shape?"
    with "no". Nothing but the published answers is used.
    """
    known: dict[str, str] = {}
    for question in found:
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
    """Return "a blue rectangle" or the like; None where colour or shape is not known."""
    if "color" not in known or "shape" not in known:
        return None
    return f"a {known['color']} {known['shape']}"


def caption_rows(found: Iterable[Question]) -> list[dict[str, Any]]:
    """Return one row an image, its caption made from the answers about it."""
    rows = []
    for number, about in by_image(found).items():
        text = caption(facts(about))
        if text is not None:
            rows.append(_row(f"caption-{number}", about[0].image, [("", text)]))
    return rows


def question_rows(
    found: Iterable[Question], turns: int = TURNS, seed: int = 0, balanced: bool = False
) -> list[dict[str, Any]]:
    """Return a row an image, with several questions about it.

    Half of a row's questions ask for a shape or a colour where there are so many (they are a
    quarter of the set, and one of them says more than a yes).

    Args:
        found: Questions of one split.
        turns: Largest number of questions in a row.
        seed: Seed of the choice of questions and of their order.
        balanced: Of the yes/no questions take first one whose answer is the rarer one to its
            words, then others by turns. Without it, answering as most images would have it is
            right for five of six.
    """
    rng = random.Random(seed)
    found = list(found)
    usual = _usual_answers(found) if balanced else None
    rows = []
    for number, about in by_image(found).items():
        chosen = _choose(about, turns, rng, usual)
        pairs = [(question.text, question.answer) for question in chosen]
        rows.append(_row(f"questions-{number}-0", chosen[0].image, pairs))
    return rows


def single_rows(found: Iterable[Question]) -> list[dict[str, Any]]:
    """Return one question a row, in the published order; rows of one image are of one group."""
    found = list(found)
    options: dict[str, set[str]] = {}
    for question in found:
        options.setdefault(question.kind, set()).add(question.answer)
    count: Counter[int] = Counter()
    rows = []
    for question in found:
        group = f"{question.split}-{question.number}"
        row: dict[str, Any] = {
            "id": f"{group}-{count[question.number]}",
            "image": _prepared(question.image),
            "question": question.text,
            "answer": question.answer,
            "kind": question.kind,
            "group": group,
        }
        if len(options[question.kind]) > 1:
            row["options"] = sorted(options[question.kind])
        rows.append(row)
        count[question.number] += 1
    return rows


def draft(seed: int = 0) -> Draft:
    """Plan the files of the published set, its two splits kept apart.

    Args:
        seed: Seed of the questions that tune.jsonl takes.

    Raises:
        UsageError: The package is missing; the message has the line that installs it.
        MMGraftError: Its file cannot be read.
    """
    root = folder()
    train, test = questions("train"), questions("test")

    def copy_images(path: Path) -> None:
        for split in get_args(Split):
            shutil.copytree(root / split / "images", path / split)

    rows = {
        "align.jsonl": _with_prepared(caption_rows(train)),
        "tune.jsonl": _with_prepared(question_rows(train, seed=seed, balanced=True)),
        "train.jsonl": single_rows(train),
        "test.jsonl": single_rows(test),
    }
    return Draft.of_rows(rows, copy_images)


def prompt(question: Question, root: Path | None = None) -> list[dict[str, Any]]:
    """Return a question as the conversation that a model is to go on with.

    Args:
        question: Any.
        root: The data set's folder, put before the image's path.
    """
    image = question.image if root is None else str(root / question.image)
    return _messages(image, [(question.text, None)])


def _usual_answers(found: Iterable[Question]) -> dict[str, str]:
    """Return the more frequent answer to each yes/no question."""
    yes: Counter[str] = Counter()
    for question in found:
        if question.kind == "yes/no":
            yes[question.text] += 1 if question.answer == "yes" else -1
    return {text: "yes" if more > 0 else "no" for text, more in yes.items()}


def _choose(
    about: Sequence[Question], turns: int, rng: random.Random, usual: Mapping[str, str] | None
) -> list[Question]:
    shuffled = rng.sample(list(about), len(about))
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
    """Put the image before the first question; an answer of None is left to be given."""
    messages: list[dict[str, Any]] = []
    for number, (text, answer) in enumerate(pairs):
        parts = [{"type": "text", "text": text}] if text else []
        if number == 0:
            parts.insert(0, {"type": "image", "image": image})
        messages.append({"role": "user", "content": parts if number == 0 else text})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def _prepared(image: str) -> str:
    """Turn the package's ``train/images/0.png`` into ``images/train/0.png``."""
    split, _, name = image.split("/")
    return f"images/{split}/{name}"


def _with_prepared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        image = row["messages"][0]["content"][0]
        image["image"] = _prepared(image["image"])
    return rows
