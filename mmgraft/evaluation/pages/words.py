"""Numbers in words: how many places, which sign, and what a difference comes to."""

from __future__ import annotations

import math
from typing import Protocol

from mmgraft.evaluation.pages.page import Cell, Tone

MINUS = "−"  # read aloud as minus, which a hyphen is not
UNRESOLVED = "not resolved"
NO_INTERVAL = "one group, no interval"
_LOWER = ("perplexity", "kl", "loss", "nll", "bits", "shift", "malformed", "unread")
_NEITHER = ("yes_ratio", "kept")
_NAMES = {
    "kl_to_base": "KL to the base",
    "cider": "CIDEr",
    "mean_iou": "mean IoU",
    "precision_at_0.5": "precision at IoU 0.5",
    "f1": "F1",
}


class WithInterval(Protocol):
    """A number with its interval: an `Estimate`, or a `Score` of a report."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def groups(self) -> int | None: ...


def score_name(name: str) -> str:
    """A score's name as people write it; lm-evaluation-harness has a filter's after a comma."""
    name, _, filtered = name.partition(",")
    shown = _NAMES.get(name, name.replace("_", " "))
    return f"{shown} ({filtered})" if filtered not in ("", "none") else shown


def direction(name: str) -> int:
    """1 where more of a score is better, -1 where less is, 0 where neither is."""
    lowered = name.lower()
    if any(word in lowered for word in _NEITHER):
        return 0
    return -1 if any(word in lowered for word in _LOWER) else 1


def number(value: float, places: int | None = None) -> str:
    """A number with so many decimal places, or as many as its size asks for."""
    if not math.isfinite(value):
        return {math.inf: "infinite", -math.inf: f"{MINUS}infinite"}.get(value, "not a number")
    if value == 0 and places is None:
        return "0"
    places = places_for(value) if places is None else places
    if places > 8:
        text = f"{value:.1e}"
    else:
        text = f"{value:,.{places}f}"
        if float(text.replace(",", "")) == 0:
            text = text.lstrip("-")
    return text.replace("-", MINUS)


def signed(value: float, places: int | None = None) -> str:
    """A difference, with its sign."""
    text = number(value, places)
    return f"+{text}" if value > 0 else text


def places_for(*values: float) -> int:
    """Decimal places that numbers of this size want, alike for all of them.

    Three below ten and less above it; more where the largest would lose its second digit, or the
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


def interval(score: WithInterval) -> str:
    """`0.800 to 0.846`, or that there is none."""
    if is_alone(score):
        return NO_INTERVAL
    places = places_for(score.value, score.low, score.high)
    return f"{number(score.low, places)} to {number(score.high, places)}"


def score_cell(score: WithInterval, strong: bool = False) -> Cell:
    """A score with its interval."""
    if score.value == score.low == score.high == 0:
        return Cell("0", strong=strong)
    places = places_for(score.value, score.low, score.high)
    return Cell(number(score.value, places), interval(score), strong=strong)


def change_cell(change: WithInterval) -> Cell:
    """A difference with its interval, in the tone of no verdict yet."""
    if is_zero(change):
        return Cell("0", "exactly")
    places = places_for(change.value, change.low, change.high)
    if is_alone(change):
        return Cell(signed(change.value, places), NO_INTERVAL)
    ends = f"{signed(change.low, places)} to {signed(change.high, places)}"
    return Cell(signed(change.value, places), ends)


def is_alone(score: WithInterval) -> bool:
    """Whether all items are of one group, so that nothing else could be drawn."""
    return score.groups == 1


def is_zero(change: WithInterval) -> bool:
    """Whether nothing differs, whatever items are drawn."""
    return change.value == change.low == change.high == 0


def is_resolved(change: WithInterval) -> bool:
    """Whether the interval leaves zero out; one of a single group says nothing."""
    return not is_alone(change) and (change.low > 0 or change.high < 0)


def verdict(change: WithInterval, name: str, sense: int | None = None) -> tuple[str, Tone]:
    """What a difference of a score comes to, in a word, and the tone of it.

    Args:
        change: The difference.
        name: Of the score.
        sense: 1 where more is better, -1 where less is, 0 where neither; default: by the name.
    """
    if is_zero(change):
        return "the same", ""
    if not is_resolved(change):
        return UNRESOLVED, "unsure"
    sense = direction(name) if sense is None else sense
    if sense == 0:
        return difference_word(change), ""
    return ("better", "good") if sense * change.value > 0 else ("worse", "bad")


def difference_word(change: WithInterval) -> str:
    """The verdict where neither more nor less is better."""
    if is_zero(change):
        return "the same"
    if not is_resolved(change):
        return UNRESOLVED
    return "higher" if change.value > 0 else "lower"


def verdict_cell(change: WithInterval, name: str, sense: int | None = None) -> Cell:
    """The verdict as a cell."""
    text, tone = verdict(change, name, sense)
    return Cell(text, tone=tone)


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `1 h 25 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def megabytes(size: float) -> str:
    """`812 MB`, `3.1 GB`."""
    return f"{size:.0f} MB" if size < 1000 else f"{size / 1000:.1f} GB"


def listed(words: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
