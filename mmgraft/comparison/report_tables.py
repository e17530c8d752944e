"""Tables of a comparison: what each arm keeps, sees and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmgraft.comparison.answers import SetAnswers
from mmgraft.comparison.claims import Claim
from mmgraft.comparison.report_arms import MeasuredArm, set_names
from mmgraft.evaluation.about_run import in_words, method_settings, method_title
from mmgraft.evaluation.pages.page import Cell, Table, Tone, plain, row
from mmgraft.evaluation.pages.words import (
    change_cell,
    duration,
    is_resolved,
    megabytes,
    number,
    score_cell,
    score_name,
    verdict,
    verdict_cell,
)
from mmgraft.evaluation.results import Score, Section, SetResult
from mmgraft.evaluation.score_tables import BLIND_NAMES, INTERVALS, KL, NOTHING, sense_of

UNTOUCHED = "the base, untouched"
TONES: dict[str, Tone] = {"holds": "good", "does not hold": "bad", "not resolved": "unsure"}


def arms_table(arms: Sequence[MeasuredArm]) -> Table:
    """What the arms are."""
    rows = []
    for arm in arms:
        record = arm.record
        rows.append(
            row(
                plain(arm.name),
                plain(arm.description) or "-",
                "-" if record is None else method_title(record.method),
                "-" if record is None else plain(method_settings(record)),
                "-" if record is None else "trained" if record.base_trained else "frozen",
                ", ".join(arm.done) or "nothing",
            )
        )
    columns = ["arm", "what it is", "method", "settings", "base", "done"]
    return Table("The arms", columns, rows)


def main_table(arms: Sequence[MeasuredArm]) -> Table:
    """The table: text before and after, vision and blind, parameters, time and memory."""
    text, vision = set_names(arms, "text"), set_names(arms, "vision")
    asked = {name: _found(arms, "text", name) for name in text}
    with_kl = [name for name in text if any(KL in one.scores for one in asked[name])]
    blind = {name: _blind_scores(_found(arms, "vision", name)) for name in vision}
    columns = ["arm", "identity"]
    before: list[Cell] = [Cell(UNTOUCHED), NOTHING]
    for name in text:
        columns.append(_titled(arms, "text", name))
        before.append(_base_cell(arms, name))
    for name in with_kl:
        columns.append(f"KL, {plain(name)}")
        before.append(Cell("0"))
    for name in vision:
        columns += [_titled(arms, "vision", name), *(f"{BLIND_NAMES[key]}" for key in blind[name])]
        before += [NOTHING] * (1 + len(blind[name]))
    columns += ["parameters trained", "training", "peak memory"]
    before += [NOTHING] * 3
    rows = [before]
    for arm in arms:
        cells = [Cell(plain(arm.name)), _identity_cell(arm)]
        cells += [_after_cell(arm.set_named("text", name)) for name in text]
        cells += [_named(arm.set_named("text", name), KL) for name in with_kl]
        for name in vision:
            one = arm.set_named("vision", name)
            cells.append(NOTHING if one is None else score_cell(one.scores[one.main], strong=True))
            cells += [_blind_cell(one, key) for key in blind[name]]
        rows.append([*cells, *_cost_cells(arm)])
    note = (
        "Identity: whether every logit of text is the base's. Text in red is worse than the "
        "untouched base's, the paired difference being resolved. The columns after a vision set "
        f"are its blind scores. {INTERVALS}"
    )
    return Table("What each arm keeps, sees and costs", columns, rows, note)


def text_changes(arms: Sequence[MeasuredArm]) -> Table | None:
    """Every text score of every arm beside the untouched base's."""
    rows = []
    for arm in arms:
        for one in arm.sets("text"):
            for name, change in one.change.items():
                if name == KL:
                    continue
                base = one.base.get(name)
                rows.append(
                    [
                        *row(plain(arm.name), plain(one.name), score_name(name)),
                        NOTHING if base is None else score_cell(base),
                        score_cell(one.scores[name], strong=name == one.main),
                        change_cell(change),
                        verdict_cell(change, name, sense_of(one, name)),
                    ]
                )
    columns = ["arm", "set", "score", "before", "after", "change", "verdict"]
    note = f"Changes are paired: the same items, asked of both. {INTERVALS}"
    return Table("Text before and after", columns, rows, note) if rows else None


def differences_table(answers: SetAnswers) -> Table | None:
    """How arms differ on the same items of a set."""
    rows = []
    for first, second in answers.pairs():
        change = answers.difference(first, second)
        rows.append(
            [
                *row(plain(first), plain(second)),
                change_cell(change),
                verdict_cell(change, answers.main),
            ]
        )
    if not rows:
        return None
    name = plain(answers.spec.name)
    note = f"Paired: {len(answers.items):,} items, the same ones. {INTERVALS}"
    columns = ["arm", "minus", score_name(answers.main), "verdict"]
    folded = answers.spec.modality == "text"  # the changes to the base are beside it
    return Table(f"{name}: differences between arms", columns, rows, note, folded)


def over_blind_table(answers: SetAnswers) -> Table | None:
    """By how much each arm beats answering blind."""
    rows = [
        [
            *row(plain(arm), BLIND_NAMES[blind]),
            change_cell(change),
            verdict_cell(change, answers.main),
        ]
        for arm in answers.measured
        for blind, change in answers.over_blind(arm).items()
    ]
    columns = ["arm", "minus", score_name(answers.main), "verdict"]
    name = plain(answers.spec.name)
    return Table(f"{name}: seeing against answering blind", columns, rows) if rows else None


def kinds_table(arms: Sequence[MeasuredArm], name: str) -> Table | None:
    """A set's main score by kind of question, arms across."""
    found = {arm.name: arm.set_named("vision", name) for arm in arms}
    asked = {arm: one for arm, one in found.items() if one is not None and one.kinds}
    kinds = sorted({kind for one in asked.values() for kind in one.kinds})
    if len(kinds) < 2:
        return None
    rows = []
    for kind in kinds:
        scores = [one.kinds.get(kind, {}).get(one.main) for one in asked.values()]
        count = next((score.count for score in scores if score is not None), 0)
        cells = [NOTHING if score is None else score_cell(score) for score in scores]
        rows.append([*row(plain(kind), count), *cells])
    main = next(iter(asked.values())).main
    columns = ["kind", "items", *map(plain, asked)]
    return Table(f"{plain(name)}: {score_name(main)} by kind of question", columns, rows)


def dialogues_table(arms: Sequence[MeasuredArm]) -> Table | None:
    """The last question of each shape of dialogue, arms across."""
    asked = [arm for arm in arms if arm.sets("iit")]
    rows = []
    for shape in set_names(asked, "iit"):
        found = [arm.set_named("iit", shape) for arm in asked]
        one = next(each for each in found if each is not None)
        cells = [_named(each, one.main) for each in found]
        rows.append([*row(plain(shape), one.items), *cells])
    columns = ["shape", "dialogues", *(plain(arm.name) for arm in asked)]
    note = f"Accuracy of the last question, the same dialogues for all arms. {INTERVALS}"
    return Table("Dialogues of text (T) and images (V)", columns, rows, note) if rows else None


def claims_table(found: Sequence[Claim]) -> Table:
    """Each claim with what was measured and what it comes to."""
    rows = [
        [
            Cell(claim.sentence),
            Cell(claim.verdict, tone=TONES[claim.verdict]),
            Cell(claim.measured),
            Cell(plain(", ".join(claim.arms))),
            Cell(plain(claim.set or "-")),
            Cell(claim.source),
        ]
        for claim in found
    ]
    columns = ["claim", "verdict", "measured", "arms", "set", "paper"]
    note = (
        "A claim holds where the 95 % interval of the paired difference (first arm minus second) "
        "leaves zero out on the claimed side; where the interval holds zero, it is not resolved. "
        "One seed, one base and one budget: what holds here need not hold elsewhere."
    )
    return Table("The papers' claims, held against these arms", columns, rows, note)


def costs_table(arms: Sequence[MeasuredArm]) -> Table | None:
    """What each training cost and where it ended."""
    rows = []
    for arm in arms:
        told = arm.training
        if not told:
            continue
        steps = told.get("steps") or {}
        losses = {k: v for k, v in (told.get("final_losses") or {}).items() if v is not None}
        rows.append(
            [
                Cell(plain(arm.name)),
                *_cost_cells(arm),
                _measured(told.get("cpu_seconds"), duration),
                _measured(told.get("peak_card_memory_mb"), megabytes),
                Cell(plain(", ".join(f"{k} {in_words(v)}" for k, v in steps.items())) or "-"),
                Cell(plain(", ".join(f"{k} {number(v)}" for k, v in losses.items())) or "-"),
            ]
        )
    columns = ["arm", "parameters trained", "training", "peak memory", "processor time",
               "memory on the card", "steps", "last loss"]  # fmt: skip
    return Table("What each training cost", columns, rows) if rows else None


# -- cells --------------------------------------------------------------------------------------


def _found(arms: Sequence[MeasuredArm], section: Section, name: str) -> list[SetResult]:
    found = (arm.set_named(section, name) for arm in arms)
    return [one for one in found if one is not None]


def _blind_scores(found: Sequence[SetResult]) -> list[str]:
    return [name for name in BLIND_NAMES if any(name in one.blind for one in found)]


def _titled(arms: Sequence[MeasuredArm], section: Section, name: str) -> str:
    return f"{plain(name)}, {score_name(_found(arms, section, name)[0].main)}"


def _base_cell(arms: Sequence[MeasuredArm], name: str) -> Cell:
    """The base's score; the same whichever arm it was measured beside."""
    for one in _found(arms, "text", name):
        if one.main in one.base:
            return score_cell(one.base[one.main], strong=True)
    return NOTHING


def _identity_cell(arm: MeasuredArm) -> Cell:
    if arm.identity is None:
        return NOTHING
    if arm.identity["identical"]:
        return Cell("bit for bit", tone="good")
    return Cell("no: trained") if arm.base_trained else Cell("no", tone="bad")


def _after_cell(one: SetResult | None) -> Cell:
    if one is None:
        return NOTHING
    change = one.change.get(one.main)
    cell = score_cell(one.scores[one.main], strong=True)
    if change is None or not is_resolved(change):
        return cell
    return Cell(
        cell.text, cell.detail, verdict(change, one.main, sense_of(one, one.main))[1], strong=True
    )


def _named(one: SetResult | None, name: str) -> Cell:
    score: Score | None = None if one is None else one.scores.get(name)
    return NOTHING if score is None else score_cell(score)


def _blind_cell(one: SetResult | None, blind: str) -> Cell:
    score = None if one is None else one.blind.get(blind, {}).get(one.main)
    return NOTHING if score is None else score_cell(score)


def _cost_cells(arm: MeasuredArm) -> list[Cell]:
    told = arm.training
    return [
        _measured(told.get("trained_parameters"), lambda value: f"{value:,}"),
        _measured(told.get("seconds"), duration),
        _measured(told.get("peak_memory_mb"), megabytes),
    ]


def _measured(value: object, words: Callable[[Any], str]) -> Cell:
    return Cell(words(value)) if isinstance(value, int | float) else NOTHING
