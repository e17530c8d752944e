"""Numbers in words: their decimal places and signs, and what a difference comes to."""

import math
from collections.abc import Sequence
from typing import Any

from mmgraft.runs.results import Score

MINUS = "−"  # screen readers read it as minus, which a hyphen is not
UNRESOLVED = "not resolved"
NO_INTERVAL = "one group, no interval"
_LOWER_IS_BETTER = ("perplexity", "kl", "loss", "nll", "bits", "shift", "malformed", "unread")
_NEITHER_IS_BETTER = ("yes_ratio", "kept")
_NAMES = {
    "kl_to_base": "KL to the base",
    "cider": "CIDEr",
    "mean_iou": "mean IoU",
    "precision_at_0.5": "precision at IoU 0.5",
    "f1": "F1",
}


def score_name(name: str) -> str:
    """Return a score's name as people write it; lm-eval has a filter's name after a comma."""
    name, _, filtered = name.partition(",")
    shown = _NAMES.get(name, name.replace("_", " "))
    return f"{shown} ({filtered})" if filtered not in ("", "none") else shown


def direction(name: str) -> int:
    """Return 1 where more of a score is better, -1 where less is, 0 where neither is."""
    lowered = name.lower()
    if any(word in lowered for word in _NEITHER_IS_BETTER):
        return 0
    return -1 if any(word in lowered for word in _LOWER_IS_BETTER) else 1


def number(value: float, decimals: int | None = None) -> str:
    """Return a number with so many decimal places; by default as many as its size needs."""
    if not math.isfinite(value):
        return {math.inf: "infinite", -math.inf: f"{MINUS}infinite"}.get(value, "not a number")
    if value == 0 and decimals is None:
        return "0"
    decimals = decimals_for(value) if decimals is None else decimals
    text = f"{value:.1e}" if decimals > 8 else f"{value:,.{decimals}f}"
    if decimals <= 8 and float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def signed(value: float, decimals: int | None = None) -> str:
    """Return a difference with its sign."""
    text = number(value, decimals)
    return f"+{text}" if value > 0 else text


def decimals_for(*values: float) -> int:
    """Return how many decimal places numbers of this size need, alike for all of them.

    Three below ten and fewer above it; more where the largest would lose its second digit, or the
    interval between them would.
    """
    finite = [value for value in values if math.isfinite(value)]
    largest = max((abs(value) for value in finite), default=0.0)
    if not largest:
        return 3
    wanted = 3 if largest < 10 else max(0, 3 - math.floor(math.log10(largest)))
    for size in (largest, max(finite) - min(finite)):
        if size > 0 and wanted <= 8:
            wanted = max(wanted, min(1 - math.floor(math.log10(size)), 9))
    return wanted


def interval(score: Score) -> str:
    """Return ``0.800 to 0.846``, or that there is no interval."""
    if score.groups == 1:
        return NO_INTERVAL
    decimals = decimals_for(score.value, score.low, score.high)
    return f"{number(score.low, decimals)} to {number(score.high, decimals)}"


def with_interval(score: Score | None, strong: bool = False) -> str:
    """Return ``0.823 (0.800 to 0.846)``, in bold where it is ``strong``; ``-`` for no score."""
    if score is None:
        return "-"
    mark = "**" if strong else ""
    if is_zero(score):
        return f"{mark}0{mark}"
    decimals = decimals_for(score.value, score.low, score.high)
    return f"{mark}{number(score.value, decimals)}{mark} ({interval(score)})"


def change_with_interval(change: Score | None) -> str:
    """Return a difference with its interval, such as ``+0.012 (−0.004 to +0.028)``."""
    if change is None:
        return "-"
    if is_zero(change):
        return "0 (exactly)"
    decimals = decimals_for(change.value, change.low, change.high)
    ends = f"{signed(change.low, decimals)} to {signed(change.high, decimals)}"
    ends = NO_INTERVAL if change.groups == 1 else ends
    return f"{signed(change.value, decimals)} ({ends})"


def is_zero(change: Score) -> bool:
    """Return whether nothing differs, whatever items are resampled."""
    return change.value == change.low == change.high == 0


def verdict(change: Score | None, name: str, sense: int | None = None) -> str:
    """Return in a word what a difference of a score comes to.

    Args:
        change: The difference; None gives ``-``.
        name: Name of the score.
        sense: 1 where more is better, -1 where less is, 0 where neither is; by default the name
            decides.
    """
    if change is None:
        return "-"
    if is_zero(change):
        return "the same"
    if not change.resolved:
        return UNRESOLVED
    sense = direction(name) if sense is None else sense
    if sense == 0:
        return "higher" if change.value > 0 else "lower"
    return "better" if sense * change.value > 0 else "worse"


def duration(seconds: float) -> str:
    """Return ``48 s``, ``12 min``, ``1 h 25 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def megabytes(size: float) -> str:
    """Return ``812 MB``, ``3.1 GB``."""
    return f"{size:.0f} MB" if size < 1000 else f"{size / 1000:.1f} GB"


def in_words(value: Any) -> str:
    """Return a value of JSON or YAML as a table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {in_words(one)}" for key, one in value.items())
    return ", ".join(map(in_words, value)) if isinstance(value, list) else str(value)


def listed(words: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
