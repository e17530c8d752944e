"""The arms' kept answers to one set, scored again item by item, so that differences are paired."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmgraft.comparison.report_arms import MeasuredArm
from mmgraft.errors import UsageError
from mmgraft.evaluation.choice import ChoiceScore
from mmgraft.evaluation.estimate import Estimate
from mmgraft.evaluation.item_files import (
    data_file,
    file_sha256,
    read_items,
    read_training_answers,
)
from mmgraft.evaluation.items import Item
from mmgraft.evaluation.measured import Measured
from mmgraft.evaluation.pages.words import direction
from mmgraft.evaluation.perplexity import TextScore, WindowScore, measure_texts
from mmgraft.evaluation.predictions import read_predictions
from mmgraft.evaluation.results import Section, SetResult
from mmgraft.evaluation.scoring import groups_of, measure_answers, measure_choices, measure_prior
from mmgraft.evaluation.set_spec import SetSpec

NO_IMAGE, PRIOR = "no_image", "prior"
ALL_PAIRS = 5
"""So many arms are compared each with each; more of them each with the best."""

_NEEDED = {
    "choice": {"answer", "sums", "tokens", "characters"},
    "perplexity": {"words", "bytes", "windows"},
}


@dataclass(frozen=True)
class SetAnswers:
    """What the arms said to one set.

    Attributes:
        spec: The set.
        items: In the order of the file.
        groups: What the bootstrap draws together, one a row of what was measured.
        said: Each arm's answer to every item, in words; of perplexity there are none.
        measured: Each arm's answers, scored.
        no_image: The same without the image, of arms that were asked so.
        prior: The most frequent training answers, scored.
        missing: Why an arm is not among them.
    """

    spec: SetSpec
    items: list[Item]
    groups: list[str | int]
    said: dict[str, list[str]]
    measured: dict[str, Measured]
    no_image: dict[str, Measured]
    prior: Measured | None
    missing: dict[str, str]

    @property
    def main(self) -> str:
        """The score that a table shows."""
        return next(iter(self.measured.values())).main

    def difference(self, first: str, second: str) -> Estimate:
        """The main score of one arm minus that of another, on the same items."""
        return self._change(self.measured[first], self.measured[second])

    def over_blind(self, arm: str) -> dict[str, Estimate]:
        """The main score of an arm minus each of its blind scores, on the same items."""
        blind = {PRIOR: self.prior, NO_IMAGE: self.no_image.get(arm)}
        return {
            name: self._change(self.measured[arm], one)
            for name, one in blind.items()
            if one is not None and self.main in one.statistics
        }

    def pairs(self) -> list[tuple[str, str]]:
        """Arms to be compared, the later one minus the earlier, or each minus the best of many."""
        names = list(self.measured)
        if len(names) <= ALL_PAIRS:
            return [(second, first) for first, second in itertools.combinations(names, 2)]
        sense = direction(self.main) or 1
        best = max(names, key=lambda name: sense * self.measured[name].values()[self.main])
        return [(name, best) for name in names if name != best]

    def _change(self, after: Measured, before: Measured) -> Estimate:
        """Of the main score alone: blind answers may have fewer scores, so fewer columns."""
        one, two = (
            Measured(each.columns, {self.main: each.statistics[self.main]}, self.main)
            for each in (after, before)
        )
        if one.columns.shape != two.columns.shape:
            one, two = _alone(one), _alone(two)
        return one.change(two, self.groups)[self.main]


def read_answers(spec: SetSpec, arms: Sequence[MeasuredArm]) -> SetAnswers | None:
    """Answers of all arms that were asked a set and have kept them; None where none has.

    Args:
        spec: The set, its paths whole.
        arms: Of the comparison.

    Raises:
        UsageError: The set's file is not there any more, or cannot be read.
    """
    asked = [(arm, arm.set_named(_section(spec), spec.name)) for arm in arms]
    if not any(found is not None and found.predictions for _, found in asked):
        return None
    items = read_items(spec)
    sha256 = file_sha256(data_file(spec))
    groups: list[str | int] = []
    said: dict[str, list[str]] = {}
    measured: dict[str, Measured] = {}
    no_image: dict[str, Measured] = {}
    missing: dict[str, str] = {}
    for arm, found in asked:
        why = _why_not(found, sha256)
        rows = None if found is None or why else _rows(arm.run, found.predictions, spec, items)
        if found is None or rows is None:
            missing[arm.name] = why or "its answers are not whole"
            continue
        if spec.metric != "perplexity":
            said[arm.name] = [str(row["answer"]) for row in rows]
        measured[arm.name], groups = _measure(spec, items, rows)
        blind = _rows(arm.run, _without_image(found.predictions), spec, items)
        if blind is not None and NO_IMAGE in found.blind:
            no_image[arm.name], _ = _measure(spec, items, blind)
    if not measured:
        return None
    prior = _prior(spec, items)
    return SetAnswers(spec, items, groups, said, measured, no_image, prior, missing)


def _section(spec: SetSpec) -> Section:
    return "text" if spec.modality == "text" else "vision"


def _why_not(found: SetResult | None, sha256: str) -> str | None:
    if found is None:
        return "it was not asked"
    if found.predictions is None:
        return "its answers were not kept"
    return None if found.sha256 == sha256 else "the set's file has changed since"


def _without_image(predictions: str | None) -> str | None:
    return None if predictions is None else f"{predictions.removesuffix('.jsonl')}.no_image.jsonl"


def _rows(
    run: Path, name: str | None, spec: SetSpec, items: Sequence[Item]
) -> list[dict[str, Any]] | None:
    """One row an item, in their order; None where one is missing, or was scored otherwise."""
    if name is None:
        return None
    needed = _NEEDED.get(spec.metric, {"answer"})
    found = read_predictions(run / name)
    kept = {str(row["id"]): row for row in found if needed <= row.keys()}
    return [kept[item.id] for item in items] if all(one.id in kept for one in items) else None


def _measure(
    spec: SetSpec, items: Sequence[Item], rows: Sequence[dict[str, Any]]
) -> tuple[Measured, list[str | int]]:
    """What the rows are worth, and the groups to draw."""
    if spec.metric == "perplexity":
        # Tokens and log-likelihood alone: not every arm was measured beside its base.
        texts = [
            TextScore(
                str(row["id"]),
                row["words"],
                row["bytes"],
                tuple(WindowScore(*window[:2]) for window in row["windows"]),
            )
            for row in rows
        ]
        return measure_texts(texts, together=groups_of(items) if spec.chat else None)
    groups: list[str | int] = [*groups_of(items)]
    if spec.metric != "choice":
        return measure_answers(spec, items, [str(row["answer"]) for row in rows]), groups
    scores = [
        ChoiceScore(
            str(row["id"]), tuple(row["sums"]), tuple(row["tokens"]), tuple(row["characters"])
        )
        for row in rows
    ]
    return measure_choices(items, scores), groups


def _prior(spec: SetSpec, items: Sequence[Item]) -> Measured | None:
    if PRIOR not in spec.blind or spec.train is None:
        return None
    try:
        return measure_prior(spec, items, read_training_answers(spec))
    except UsageError:
        return None  # the file of training rows is gone; the score itself stands in the results


def _alone(measured: Measured) -> Measured:
    """The first score of means without the others, for answers that have no others."""
    return Measured.means(**{measured.main: list(measured.columns[:, 0])})
