"""The papers' claims, each held against what was measured of the arms.

Sources: IAA = arXiv 2408.12902; Wings = arXiv 2406.03496. A claim about a difference holds where
its 95 % interval leaves zero out on the claimed side; where it holds zero, it is not resolved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from mmgraft.comparison.answers import SetAnswers
from mmgraft.comparison.report_arms import MeasuredArm
from mmgraft.evaluation.pages.page import plain
from mmgraft.evaluation.pages.words import (
    UNRESOLVED,
    WithInterval,
    change_cell,
    direction,
    is_resolved,
    is_zero,
    score_cell,
    score_name,
)
from mmgraft.evaluation.results import Score, SetResult
from mmgraft.evaluation.score_tables import BLIND_NAMES, KL, sense_of
from mmgraft.strict import MeasuredModel

IAA, WINGS = "IAA", "Wings"
BOTH = f"{IAA}, {WINGS}"
Verdict = Literal["holds", "does not hold", "not resolved"]


class Claim(MeasuredModel):
    """A sentence of a paper, and what one measurement says of it."""

    source: str = Field(description="the paper whose claim it is")
    sentence: str
    arms: list[str] = Field(description="which it was tested on")
    set: str | None = Field(default=None, description="on which items")
    measured: str = Field(description="the number with its interval, in words")
    verdict: Verdict


def claims(arms: Sequence[MeasuredArm], answers: Sequence[SetAnswers]) -> list[Claim]:
    """Every claim that the arms and what was measured of them can test.

    Args:
        arms: Of the comparison.
        answers: Their answers to the sets with images.
    """
    return [
        *_trained_bases_lose_text(arms),
        *_frozen_bases_lose_nothing(arms),
        *_arms_see(arms, answers),
        *_arms_against_each_other(arms, answers),
        *_attention(arms),
    ]


# -- text ---------------------------------------------------------------------------------------


def _trained_bases_lose_text(arms: Sequence[MeasuredArm]) -> Iterator[Claim]:
    for arm in arms:
        if not arm.base_trained:
            continue
        for one in arm.sets("text"):
            kl = one.scores.get(KL)
            if kl is not None:
                yield _claim(
                    BOTH, "Training the base moves its text away from what it was.", [arm],
                    one.name, f"KL to the base {score_cell(kl)}", _above(kl),
                )  # fmt: skip
            change = one.change.get(one.main)
            if change is not None and one.main != KL:
                verdict = _sided(change, sense_of(one, one.main), better=False)
                yield _claim(
                    BOTH, f"Training the base costs text: {_lost(one)}.", [arm],
                    one.name, _told(one.main, change), verdict,
                )  # fmt: skip


def _lost(one: SetResult) -> str:
    worse = "rises" if sense_of(one, one.main) < 0 else "falls"
    return f"{score_name(one.main)} {worse}"


def _frozen_bases_lose_nothing(arms: Sequence[MeasuredArm]) -> Iterator[Claim]:
    sentence = "With the base frozen text is exactly the base's."
    for arm in arms:
        identity = arm.identity
        if arm.record is None or arm.base_trained or identity is None:
            continue
        moved = [
            f"{plain(one.name)}: {_told(name, change)}"
            for one in arm.sets("text")
            for name, change in one.change.items()
            if not is_zero(change)
        ]
        same = bool(identity["identical"]) and not moved
        scored = ", and every text score" if arm.sets("text") else ""
        told = (
            f"every logit of {identity['positions']:,} positions the same{scored}"
            if same
            else "; ".join(moved) or f"logits differ, {plain(identity['first_difference'])}"
        )
        yield _claim(BOTH, sentence, [arm], None, told, "holds" if same else "does not hold")


# -- vision -------------------------------------------------------------------------------------


def _arms_see(arms: Sequence[MeasuredArm], answers: Sequence[SetAnswers]) -> Iterator[Claim]:
    for one in answers:
        for arm in arms:
            if arm.name not in one.measured:
                continue
            for blind, change in one.over_blind(arm.name).items():
                yield _claim(
                    BOTH,
                    f"The graft sees: it beats answering blind ({BLIND_NAMES[blind]}).",
                    [arm],
                    one.spec.name,
                    _told(one.main, change),
                    _sided(change, direction(one.main), better=True),
                )


@dataclass(frozen=True)
class _Contest:
    """That arms of one sort see more than arms of another, or no less."""

    source: str
    sentence: str
    first: Callable[[MeasuredArm], bool]
    second: Callable[[MeasuredArm], bool]
    no_less: bool = False
    alike: bool = False
    """Only between arms whose other settings are the same."""


def _is(method: str, **settings: object) -> Callable[[MeasuredArm], bool]:
    def fits(arm: MeasuredArm) -> bool:
        return arm.method == method and all(
            arm.config.get(name) == value for name, value in settings.items()
        )

    return fits


def _projector_only(arm: MeasuredArm) -> bool:
    return arm.method == "llava" and not arm.base_trained


def _trained_llava(arm: MeasuredArm) -> bool:
    return arm.method == "llava" and arm.base_trained


_ABLATION = "IAA's ablation: structure {} sees more than structure {}."
_LEARNERS = "Wings' ablation: both learners see more than the {} ones alone."
_BOTH_LEARNERS = ["visual", "textual"]
_CONTESTS = (
    _Contest(IAA, "Inserted layers see more than a projector alone.", _is("iaa"), _projector_only),
    _Contest(WINGS, "Learners see more than a projector alone.", _is("wings"), _projector_only),
    _Contest(
        IAA, "Inserted layers on a frozen base see no less than LLaVA with its base trained.",
        _is("iaa"), _trained_llava, no_less=True,
    ),
    _Contest(
        WINGS, "Learners see no less than LLaVA with its base trained.",
        _is("wings"), _trained_llava, no_less=True,
    ),
    *(
        _Contest(
            IAA, _ABLATION.format("c", other),
            _is("iaa", structure="c"), _is("iaa", structure=other), alike=True,
        )
        for other in ("a", "b")
    ),
    *(
        _Contest(
            WINGS, _LEARNERS.format(other),
            _is("wings", learners=_BOTH_LEARNERS), _is("wings", learners=[other]), alike=True,
        )
        for other in _BOTH_LEARNERS
    ),
)  # fmt: skip


def _arms_against_each_other(
    arms: Sequence[MeasuredArm], answers: Sequence[SetAnswers]
) -> Iterator[Claim]:
    for contest in _CONTESTS:
        for one in answers:
            there = [arm for arm in arms if arm.name in one.measured]
            for first in filter(contest.first, there):
                for second in filter(contest.second, there):
                    if contest.alike and not _alike(first, second):
                        continue
                    change = one.difference(first.name, second.name)
                    verdict = _sided(change, direction(one.main), better=True)
                    if contest.no_less and is_zero(change):
                        verdict = "holds"
                    yield _claim(
                        contest.source, contest.sentence, [first, second],
                        one.spec.name, _told(one.main, change), verdict,
                    )  # fmt: skip


_COMPARED = ("structure", "gate", "learners", "router")
_BUDGET = ("max_steps", "epochs", "batch_size", "accumulate")


def _alike(first: MeasuredArm, second: MeasuredArm) -> bool:
    """Whether two arms' methods and stages are set alike but for what an ablation compares."""
    one, two = (
        {name: value for name, value in arm.config.items() if name not in _COMPARED}
        for arm in (first, second)
    )
    return one == two and _stages(first) == _stages(second)


def _stages(arm: MeasuredArm) -> list[tuple[Any, ...]]:
    """Length, batch and learning rates of each stage; groups that are trained may be others."""
    recipe = (None if arm.record is None else arm.record.recipe) or {}
    found = []
    for stage in recipe.get("stages") or []:
        lr = stage.get("lr")
        rates = set(lr.values() if isinstance(lr, dict) else [lr])
        found.append((rates, *(stage.get(key) for key in _BUDGET)))
    return found


# -- attention ----------------------------------------------------------------------------------


def _attention(arms: Sequence[MeasuredArm]) -> Iterator[Claim]:
    for arm in arms:
        if arm.method != "wings":
            continue
        for one in arm.sets("laws"):
            found = arm.sections["laws"].details.get(one.name, {}).get("learners_change")
            if found is None:
                continue
            change = Score.parse(found, f"learners_change of {one.name}")
            if change.low or change.high:  # a visual learner alone adds to neither text: exactly 0
                yield _claim(
                    WINGS,
                    "With the learners beside it the attention shifts less than without them.",
                    [arm],
                    one.name,
                    _told("attention_shift", change),
                    _sided(change, -1, better=True),
                )


# -- verdicts -----------------------------------------------------------------------------------


def _claim(
    source: str,
    sentence: str,
    arms: Sequence[MeasuredArm],
    name: str | None,
    told: str,
    verdict: Verdict,
) -> Claim:
    return Claim(
        source=source,
        sentence=sentence,
        arms=[arm.name for arm in arms],
        set=name,
        measured=told,
        verdict=verdict,
    )


def _told(name: str, change: WithInterval) -> str:
    return f"{score_name(name)} {change_cell(change)}"


def _above(score: WithInterval) -> Verdict:
    """Whether a number that cannot be negative is above zero."""
    if is_zero(score):
        return "does not hold"
    return "holds" if is_resolved(score) else UNRESOLVED


def _sided(change: WithInterval, sense: int, better: bool) -> Verdict:
    """Whether a difference is resolved on the claimed side, `sense` saying which is better."""
    if is_zero(change):
        return "does not hold"
    if not is_resolved(change):
        return UNRESOLVED
    claimed = (sense or 1) * (1 if better else -1)
    return "holds" if claimed * change.value > 0 else "does not hold"
