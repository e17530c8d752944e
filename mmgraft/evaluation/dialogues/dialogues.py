"""Interleaved dialogues (IIT): questions with and without images joined by what they mean.

The benchmark of Wings (arXiv 2406.03496) scores the last of several questions in six
shapes. Its data were never released; these are built from any multiple-choice sets. Free of torch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmgraft.errors import UsageError
from mmgraft.evaluation.items.item import Item

SHAPES = ("T", "TT", "TTT", "TTV", "TV", "V")
"""A letter a question: T of text, V with an image. The last one is scored."""

WORDS = {"T": "text", "V": "visual"}
_DIGITS = 6  # of a cosine: less is noise of the machine, and ties go to the first in the set


@dataclass(frozen=True)
class Candidate:
    """A question that can be part of a dialogue.

    Attributes:
        set: Name of its set.
        item: With options and the right one.
        vector: Its embedding, ``(h,)`` of length 1.
    """

    set: str
    item: Item
    vector: np.ndarray


@dataclass(frozen=True)
class Dialogue:
    """Questions in their order, all but the last of them answered.

    Attributes:
        id: Shape and number, such as ``TTV-3``; one number has the same last question in every
            shape that ends with the same letter.
        shape: One of :data:`SHAPES`.
        parts: The questions.
    """

    id: str
    shape: str
    parts: tuple[Candidate, ...]

    @property
    def last(self) -> Item:
        """The question that is scored."""
        return self.parts[-1].item

    def messages(self) -> list[Mapping[str, Any]]:
        """Return the conversation up to the last question, earlier ones with their answers."""
        turns: list[Mapping[str, Any]] = []
        for part in self.parts[:-1]:
            turns += [*_turns(part.item, first=not turns), answer_turn(part.item)]
        return [*turns, *_turns(self.last, first=not turns)]


def answer_turn(item: Item) -> dict[str, str]:
    """Return the right answer of an item as a turn."""
    assert item.gold is not None
    return {"role": "assistant", "content": item.options[item.gold]}


def title(shape: str) -> str:
    """Return a shape as the paper writes it: ``(T,T,V)``."""
    return f"({','.join(shape)})"


def buildable(counts: Mapping[str, int]) -> list[str]:
    """Return the shapes for which there are enough questions of every kind."""
    return [
        shape
        for shape in SHAPES
        if all(counts.get(letter, 0) >= shape.count(letter) for letter in shape)
    ]


def build_dialogues(
    pools: Mapping[str, Sequence[Candidate]],
    count: int,
    shapes: Sequence[str] = SHAPES,
    seed: int = 0,
) -> dict[str, list[Dialogue]]:
    """Build dialogues of each shape.

    The last questions are sampled by a seed, the same for every shape with the same last letter, so
    that what stands before them is all that differs. Each gets, of the questions not yet used
    in the shape, the most similar by cosine, the most similar one right before it. In a shape no
    question is used twice, and none has the words of the last.

    Args:
        pools: Candidates by letter: ``T`` and ``V``.
        count: Dialogues a shape; fewer where the sets have too few questions for all shapes.
        shapes: Which ones; see :data:`SHAPES`. Others of T and V work alike.
        seed: Of the sample.

    Raises:
        UsageError: An unknown letter, or not enough questions for one dialogue of a shape.
    """
    for shape in shapes:
        if not shape or set(shape) - set(WORDS):
            raise UsageError(f"no dialogue of shape {shape!r}; choose from {', '.join(SHAPES)}")
        for letter in WORDS:
            if len(pools.get(letter, ())) < shape.count(letter):
                raise UsageError(
                    f"a dialogue {title(shape)} has {shape.count(letter)} {WORDS[letter]} "
                    f"questions, and there are {len(pools.get(letter, ()))}; give a larger "
                    "multiple-choice set, or leave the shape out"
                )
    order = {letter: _shuffled(len(pools.get(letter, ())), letter, seed) for letter in WORDS}
    built = {}
    for shape in shapes:
        alike = [one for one in shapes if one[-1] == shape[-1]]
        most = min(
            len(pools[letter]) // one.count(letter)
            for one in alike
            for letter in dict.fromkeys(one)
        )
        lasts = order[shape[-1]][: min(count, most)]
        built[shape] = _of_shape(shape, pools, lasts)
    return built


def _of_shape(
    shape: str, pools: Mapping[str, Sequence[Candidate]], lasts: Sequence[int]
) -> list[Dialogue]:
    letter = shape[-1]
    scored = [pools[letter][index] for index in lasts]
    free: dict[str, np.ndarray] = {}
    near: dict[str, np.ndarray] = {}
    for one in dict.fromkeys(shape[:-1]):
        free[one] = np.ones(len(pools[one]), dtype=bool)
        vectors = np.stack([part.vector for part in pools[one]])  # (n, h)
        near[one] = np.round(np.stack([part.vector for part in scored]) @ vectors.T, _DIGITS)
    if letter in free:
        free[letter][list(lasts)] = False
    dialogues = []
    for number, last in enumerate(scored):
        before: list[Candidate] = []
        for one in reversed(shape[:-1]):
            index = _nearest(near[one][number], free[one], pools[one], last.item)
            if index is None:
                raise UsageError(
                    f"no {WORDS[one]} question is left to stand before {last.item.where} in a "
                    f"dialogue {title(shape)}: others have the same words; give a set with more "
                    "different questions, or build fewer dialogues"
                )
            free[one][index] = False
            before.insert(0, pools[one][index])
        dialogues.append(Dialogue(f"{shape}-{number + 1}", shape, (*before, last)))
    return dialogues


def _nearest(
    near: np.ndarray, free: np.ndarray, pool: Sequence[Candidate], last: Item
) -> int | None:
    """Return the most similar candidate that is free and has other words; of equals the first."""
    words = last.question.split()
    for index in np.argsort(-near, kind="stable"):
        if free[index] and pool[index].item.question.split() != words:
            return int(index)
    return None


def _shuffled(count: int, letter: str, seed: int) -> list[int]:
    indices = list(range(count))
    random.Random(f"{letter} {seed}").shuffle(indices)
    return indices


def _turns(item: Item, first: bool) -> list[Mapping[str, Any]]:
    """Return the turns of an item; a system prompt stands first in a dialogue or nowhere."""
    return [turn for turn in item.messages if first or turn.get("role") != "system"]
