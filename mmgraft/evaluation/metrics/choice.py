"""Multiple choice: scores of options, and which option a generated answer names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Literal

from mmgraft.evaluation.metrics.vqa import normalised

By = Literal["sum", "token", "character"]

_ALONE = re.compile(r"\(?([A-Z])\)?", re.IGNORECASE)
_FIRST = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):,\n])", re.IGNORECASE)
_NAMED = re.compile(
    r"\b(?i:answer|option|choice)\b(?:\s+is|\s*:)?\s*(?:\(([A-Z])\)|([A-Z])\b(?!\s+[a-z]))"
)


@dataclass(frozen=True)
class ChoiceScore:
    """Log-probabilities of one item's options.

    Attributes:
        id: Of the item.
        sums: Log-probability of each option's text after the question, in nats.
        tokens: Tokens of each.
        characters: Characters of each option.
    """

    id: str
    sums: tuple[float, ...]
    tokens: tuple[int, ...]
    characters: tuple[int, ...]

    def scores(self, by: By = "sum") -> list[float]:
        """Return log-probabilities as they are, a token, or a character.

        lm-evaluation-harness's ``acc`` goes by the first, its ``acc_norm`` by the last.
        """
        if by == "sum":
            return list(self.sums)
        sizes = self.tokens if by == "token" else self.characters
        return [one / max(size, 1) for one, size in zip(self.sums, sizes, strict=True)]

    def prediction(self, by: By = "sum") -> int:
        """Return the likeliest option; the first of equals."""
        scores = self.scores(by)
        return scores.index(max(scores))


def shows_options(prompt: str | None) -> bool:
    """Return whether a set's prompt shows the options with letters: then the letters are scored."""
    return prompt is not None and "{options}" in prompt


def read_choice(answer: str, options: Sequence[str]) -> int | None:
    """Read which option an answer names, or None where that is not clear.

    Tried in this order: a letter alone or at the start ("B", "(b)", "B. red"); a letter that is
    named ("the answer is B"); the words of an option and nothing else; the words of an option
    within others. Of options within each other, such as "red" in "dark red", the longer counts;
    an answer that names several is not read. A letter that no option has is no answer. Words are
    compared once :func:`normalised`.
    """
    text = answer.strip()
    letter = _ALONE.fullmatch(text) or _FIRST.match(text) or _NAMED.search(text)
    if letter is not None:
        index = ascii_uppercase.index(next(filter(None, letter.groups())).upper())
        return index if index < len(options) else None
    said = normalised(text)
    texts = [normalised(option) for option in options]
    if texts.count(said) == 1:
        return texts.index(said)
    named = [at for at, option in enumerate(texts) if option and f" {option} " in f" {said} "]
    longest = [
        at
        for at in named
        if not any(f" {texts[at]} " in f" {texts[other]} " for other in named if other != at)
    ]
    return longest[0] if len(longest) == 1 else None
