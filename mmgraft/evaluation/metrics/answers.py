"""Judge answers: visual question answering, yes or no, and multiple choice.

Yes-or-no questions about an image are scored as POPE does. Of multiple choice there are the scores
of the options, and the option that a generated answer names. A set is also answered by what its
training answers alone say.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from string import ascii_uppercase
from typing import Literal

import numpy as np

from mmgraft.errors import UsageError
from mmgraft.evaluation.metrics.intervals import Measured, ratio, share
from mmgraft.frozen import Frozen

_WORD = re.compile(r"[a-z']+")
_END = re.compile(r"[.\n]")
_YES_NO = {"yes": True, "no": False}


def read_yes_no(answer: str) -> bool | None:
    """Read what an answer says, or None where it says neither yes nor no.

    The first word decides where it is yes or no. Else the first sentence is searched as POPE's own
    evaluation does: "no" or "not" in it is a no, and here "isn't" and the like too; then "yes".
    Case and punctuation do not matter.
    """
    words = _WORD.findall(_END.split(answer.strip().lower().replace("’", "'"), maxsplit=1)[0])
    if words and words[0] in _YES_NO:
        return _YES_NO[words[0]]
    if any(word in ("no", "not") or word.endswith("n't") for word in words):
        return False
    return True if "yes" in words else None


def truth_of(answer: str, where: str) -> bool:
    """Read the right answer of an item.

    Raises:
        UsageError: The answer is neither yes nor no.
    """
    word = answer.lower().strip(" .!")
    if word not in _YES_NO:
        raise UsageError(
            f"{where}: the answer is {answer!r}, and yes_no needs yes or no; write another "
            "metric, or leave the row out"
        )
    return _YES_NO[word]


def measure_yes_no(given: Sequence[str], truth: Sequence[bool]) -> Measured:
    """Measure accuracy, precision, recall, F1 and yes ratio, yes being the positive class.

    Source: Li et al. 2023, Evaluating Object Hallucination in Large Vision-Language Models (POPE,
    arXiv 2305.10355). As in its evaluation an answer that says neither counts as a yes; ``unread``
    is the share of such answers, 0 for a model that keeps to the question. Precision and F1 are 0
    where nothing is found.

    Args:
        given: Answers of a model.
        truth: Whether yes is right.
    """
    rows = []
    for answer, right in zip(given, truth, strict=True):
        said = read_yes_no(answer)
        yes = said is not False
        found = [yes and right, yes, right, yes == right, said is None, 1]
        rows.append([*found, int(yes) + int(right)])
    columns = np.asarray(rows, dtype=np.float64).reshape(-1, 7)
    statistics = {
        "accuracy": share(3, 5),
        "precision": share(0, 1),
        "recall": share(0, 2),
        "f1": lambda sums: ratio(np.stack([2 * sums[..., 0], sums[..., 6]], axis=-1)),
        "yes_ratio": share(1, 5),
        "unread": share(4, 5),
    }
    return Measured(columns, statistics, main="accuracy")


# -- right or wrong -----------------------------------------------------------------------------


def exact(given: str, truth: str) -> bool:
    """Return whether two answers are the same but for case and white space around them."""
    return given.strip().lower() == truth.strip().lower()


_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten".split()  # noqa: SIM905
    )
} | {"none": "0"}
_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-<>@`,?!]")


def normalised(answer: str) -> str:
    """Return an answer as the VQA challenge compares it.

    Lower case, one line, no articles, numbers up to ten as digits, no punctuation but apostrophes,
    colons, and a full stop before a digit; other full stops leave no space ("u.s." is "us").
    Source: the evaluation rules of the VQA challenge (visualqa.org); its table of misspelt
    contractions is left out.
    """
    text = _IN_NUMBER.sub("", answer.lower().strip())
    text = _PUNCTUATION.sub(" ", _FULL_STOP.sub("", text))
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def vqa_match(given: str, truth: str) -> bool:
    """Return whether two answers are the same once :func:`normalised`."""
    return normalised(given) == normalised(truth)


def vqa_v2(given: str, answers: Sequence[str]) -> float:
    """Return VQAv2's accuracy of one answer: 0, 0.3, 0.6, 0.9 or 1 where ten people answered.

    The mean of ``min(n / 3, 1)`` over all choices of nine of the ten people, ``n`` of whom gave
    this answer. Answers are compared once :func:`normalised`. Source: Antol et al. 2015 (arXiv
    1505.00468), eq. of section 3, averaged as in the evaluation at visualqa.org.
    """
    said = normalised(given)
    same = [normalised(answer) == said for answer in answers]
    agreeing = sum(same)
    return sum(min((agreeing - one) / 3, 1.0) for one in same) / len(same)


def by_kind(right: Sequence[bool], kinds: Sequence[str]) -> dict[str, float]:
    """Return the share of right answers for each kind of question, kinds sorted."""
    found: dict[str, list[bool]] = defaultdict(list)
    for one, kind in zip(right, kinds, strict=True):
        found[kind].append(one)
    return {kind: sum(found[kind]) / len(found[kind]) for kind in sorted(found)}


# -- blind --------------------------------------------------------------------------------------


class Prior:
    """Answers without looking: the most frequent training answer to the same question.

    A question that training does not have gets the most frequent answer of all. Of answers equally
    frequent the first in the alphabet is taken.

    Args:
        seen: Questions and answers of the training split, at least one.
    """

    def __init__(self, seen: Iterable[tuple[str, str]]) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.overall: Counter[str] = Counter()
        for question, answer in seen:
            self.counts[question][answer] += 1
            self.overall[answer] += 1

    def __call__(self, question: str) -> str:
        """Return the answer to a question."""
        counts = self.counts.get(question, self.overall)
        return min(counts, key=lambda answer: (-counts[answer], answer))

    def option(self, question: str, options: Sequence[str]) -> int:
        """Return the option most often right after the question, then after any, then the first."""
        own = self.counts.get(question, Counter[str]())
        counts = [(own[option], self.overall[option]) for option in options]
        return counts.index(max(counts))


By = Literal["sum", "token", "character"]

_ALONE = re.compile(r"\(?([A-Z])\)?", re.IGNORECASE)
_FIRST = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):,\n])", re.IGNORECASE)
_NAMED = re.compile(
    r"\b(?i:answer|option|choice)\b(?:\s+is|\s*:)?\s*(?:\(([A-Z])\)|([A-Z])\b(?!\s+[a-z]))"
)


class ChoiceScore(Frozen):
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
