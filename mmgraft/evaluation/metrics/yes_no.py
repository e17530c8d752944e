"""Yes-or-no questions about a picture, scored as POPE does."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mmgraft.errors import UsageError
from mmgraft.evaluation.metrics.intervals import ratio
from mmgraft.evaluation.metrics.measured import Measured, share

_WORD = re.compile(r"[a-z']+")
_END = re.compile(r"[.\n]")


def read_yes_no(answer: str) -> bool | None:
    """What an answer says, or None where it says neither yes nor no.

    The first word decides where it is yes or no. Else the first sentence is searched as POPE's own
    evaluation does: "no" or "not" in it is a no, and here "isn't" and the like too; then "yes".
    Case and punctuation do not matter.
    """
    words = _WORD.findall(_END.split(answer.strip().lower().replace("’", "'"), maxsplit=1)[0])
    if words and words[0] in ("yes", "no"):
        return words[0] == "yes"
    if any(word in ("no", "not") or word.endswith("n't") for word in words):
        return False
    return True if "yes" in words else None


def truth_of(answer: str, where: str) -> bool:
    """What a set says is right.

    Raises:
        UsageError: The answer is neither yes nor no.
    """
    word = answer.strip().lower().rstrip(".")
    if word not in ("yes", "no"):
        raise UsageError(
            f"{where}: the answer {answer!r} is neither yes nor no; correct it, or score the set "
            "by another metric, such as exact"
        )
    return word == "yes"


def measure_yes_no(given: Sequence[str], truth: Sequence[bool]) -> Measured:
    """Accuracy, precision, recall, F1 and yes ratio, yes being the positive class.

    Source: Li et al. 2023, Evaluating Object Hallucination in Large Vision-Language Models (POPE,
    arXiv 2305.10355). As in its evaluation an answer that says neither counts as a yes; `unread`
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
        rows.append([yes and right, yes and not right, not yes and right, said is None, 1])
    columns = np.asarray(rows, dtype=np.float64).reshape(-1, 5)
    return Measured(
        columns,
        {
            "accuracy": _accuracy,
            "precision": _precision,
            "recall": _recall,
            "f1": _f1,
            "yes_ratio": _yes_ratio,
            "unread": share(3, 4),
        },
        main="accuracy",
    )


# Columns: true yes, false yes, false no, unread, items.


def _accuracy(sums: np.ndarray) -> np.ndarray:
    wrong = sums[..., 1] + sums[..., 2]
    return _divided(sums[..., 4] - wrong, sums[..., 4])


def _precision(sums: np.ndarray) -> np.ndarray:
    return _divided(sums[..., 0], sums[..., 0] + sums[..., 1])


def _recall(sums: np.ndarray) -> np.ndarray:
    return _divided(sums[..., 0], sums[..., 0] + sums[..., 2])


def _f1(sums: np.ndarray) -> np.ndarray:
    return _divided(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])


def _yes_ratio(sums: np.ndarray) -> np.ndarray:
    return _divided(sums[..., 0] + sums[..., 1], sums[..., 4])


def _divided(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return ratio(np.stack([above, below], axis=-1))
