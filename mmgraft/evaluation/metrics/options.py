"""Multiple choice: which option a generated answer names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

from mmgraft.evaluation.metrics.vqa import normalised

_ALONE = re.compile(r"\(?([A-Z])\)?", re.IGNORECASE)
_FIRST = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):,\n])", re.IGNORECASE)
_NAMED = re.compile(
    r"\b(?i:answer|option|choice)\b(?:\s+is|\s*:)?\s*(?:\(([A-Z])\)|([A-Z])\b(?!\s+[a-z]))"
)


def read_choice(answer: str, options: Sequence[str]) -> int | None:
    """Which option an answer names, or None where that cannot be told.

    Tried in this order: a letter alone or at the start ("B", "(b)", "B. red"); a letter that is
    named ("the answer is B"); the words of an option and nothing else; the words of an option
    within others. Of options within each other, such as "red" in "dark red", the longer counts;
    an answer that names several is not read. A letter that no option has is no answer. Words are
    compared once :func:`mmgraft.evaluation.metrics.vqa.normalised`.
    """
    text = answer.strip()
    letter = _ALONE.fullmatch(text) or _FIRST.match(text) or _NAMED.search(text)
    if letter is not None:
        place = ascii_uppercase.index(next(filter(None, letter.groups())).upper())
        return place if place < len(options) else None
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
