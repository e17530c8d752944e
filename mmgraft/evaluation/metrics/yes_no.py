"""Yes-or-no questions about an image, scored as POPE does."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mmgraft.errors import UsageError
from mmgraft.evaluation.metrics.intervals import Measured, ratio, share

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
