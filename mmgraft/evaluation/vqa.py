"""Visual question answering: answers of a model, and how many of them are right."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from mmgraft.data.processor import GraftProcessor
    from mmgraft.model.modeling import GraftedModel

Match = Callable[[str, str], bool]


# -- right or wrong -----------------------------------------------------------------------------


def exact(given: str, truth: str) -> bool:
    """Whether two answers are the same but for case and white space around them."""
    return given.strip().lower() == truth.strip().lower()


_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten".split()  # noqa: SIM905
    )
} | {"none": "0"}
_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_FULL_STOP = re.compile(r"(?<!\d)\.|\.(?!\d)")
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-<>@`,?!:]")


def normalised(answer: str) -> str:
    """An answer as the VQA challenge compares it.

    Lower case, one line, no articles, no punctuation but an apostrophe or a decimal point, numbers
    up to ten as digits. Source: the evaluation rules of the VQA challenge (visualqa.org); its table
    of misspelt contractions is left out.
    """
    text = _IN_NUMBER.sub("", answer.lower().strip())
    text = _PUNCTUATION.sub(" ", _FULL_STOP.sub(" ", text))
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def vqa_match(given: str, truth: str) -> bool:
    """Whether two answers are the same once :func:`normalised`."""
    return normalised(given) == normalised(truth)


PEOPLE = 4
"""With fewer answers of people not even the answer of all would count in full."""


def vqa_v2(given: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy of one answer: 0, 0.3, 0.6, 0.9 or 1 where ten people answered.

    The mean of ``min(n / 3, 1)`` over all choices of nine of the ten people, ``n`` of whom gave
    this answer. Answers are compared once :func:`normalised`. Source: Antol et al. 2015 (arXiv
    1505.00468), eq. of section 3, averaged as in the evaluation at visualqa.org; here for any
    number of people from four on.

    Raises:
        UsageError: Fewer answers of people.
    """
    if len(answers) < PEOPLE:
        raise UsageError(
            f"VQAv2's accuracy needs ten people's answers, or at least {PEOPLE}, not "
            f"{len(answers)}; give them all, or score by exact or vqa"
        )
    said = normalised(given)
    same = [normalised(answer) == said for answer in answers]
    agreeing = sum(same)
    return sum(min((agreeing - one) / 3, 1.0) for one in same) / len(same)


def by_kind(right: Sequence[bool], kinds: Sequence[str]) -> dict[str, float]:
    """The share of right answers for each kind of question, kinds in order of their names."""
    found: dict[str, list[bool]] = defaultdict(list)
    for one, kind in zip(right, kinds, strict=True):
        found[kind].append(one)
    return {kind: sum(found[kind]) / len(found[kind]) for kind in sorted(found)}


# -- blind --------------------------------------------------------------------------------------


class Prior:
    """Answers without looking: the most frequent training answer to the same question.

    A question that training never asked gets the most frequent answer of all. Of answers equally
    frequent the first in the alphabet is taken.

    Args:
        seen: Questions and answers of the training split.
    """

    def __init__(self, seen: Iterable[tuple[str, str]]) -> None:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for question, answer in seen:
            counts[question][answer] += 1
            overall[answer] += 1
        if not overall:
            raise UsageError("no training answers to count; give at least one")
        self.fallback = _most_frequent(overall)
        self.answers: Mapping[str, str] = {q: _most_frequent(c) for q, c in counts.items()}

    def __call__(self, question: str) -> str:
        """The answer to a question."""
        return self.answers.get(question, self.fallback)


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))


# -- a model's answers --------------------------------------------------------------------------


def answer(
    model: GraftedModel,
    processor: GraftProcessor,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 8,
    features: Callable[[list[Path]], Tensor] | None = None,
    workflow: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Greedy answers of a model, in batches of rows of like length.

    Args:
        model: With a workflow that sees, where conversations have images.
        processor: The model's.
        conversations: Messages, each ending with a question.
        batch_size: Conversations at a time.
        max_new_tokens: An answer is cut there.
        features: The tower's features of image files, ``(n, P, tower width)``, such as a cache
            gives; by default images are opened and run through the tower.
        workflow: For all rows; by default rows without an image run ``text``.
        progress: Told how many are answered, and of how many.

    Returns:
        Texts without special tokens, in the order of the conversations.

    Raises:
        UsageError: An image that cannot be read, or a conversation that the template refuses.
    """
    import torch

    from mmgraft.data.images import open_images

    encoded = [
        processor.encode(messages, where=f"conversation {number}")
        for number, messages in enumerate(conversations, start=1)
    ]
    order = sorted(range(len(encoded)), key=lambda at: len(encoded[at]))
    texts = [""] * len(encoded)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [encoded[at] for at in chosen]
        inputs: dict[str, Any] = processor.collate(rows, "left")
        images = [image for row in rows for image in row.images]
        if images and features is not None:
            inputs["image_features"] = features([Path(image) for image in images])
        elif images:
            inputs["pixel_values"] = processor.pixels(open_images(images, "an answer's prompt"))
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with torch.no_grad():
            made = model.generate(
                **inputs,
                workflow=workflow,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=processor.pad_id,
            )
        length = inputs["input_ids"].shape[1]
        for at, ids in zip(chosen, made, strict=True):
            texts[at] = processor.decode(ids[length:]).strip()
        progress(start + len(chosen), len(order))
    return texts
