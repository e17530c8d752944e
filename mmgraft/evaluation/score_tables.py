"""Tables of a run's results, for its report, its model card and a comparison. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mmgraft.evaluation.pages.page import Cell, Table, as_code, plain, row
from mmgraft.evaluation.pages.words import (
    MINUS,
    change_cell,
    direction,
    number,
    score_cell,
    score_name,
    verdict_cell,
)
from mmgraft.evaluation.results import Results, Score, SetResult

NOTHING = Cell("-")
DIFFERENCE = f"graft\N{NO-BREAK SPACE}{MINUS}\N{NO-BREAK SPACE}base"
KL = "kl_to_base"
INTERVALS = (
    "Ranges are 95 % bootstrap intervals over the items; items about one picture are drawn "
    "together."
)
SHOWN_DIGITS = 16
EQUAL = "equal by identity"
"""What a set's settings say of a base that was not asked again."""

BLIND_NAMES = {"prior": "prior", "no_image": "no image"}


def identity_sentence(identity: dict[str, Any]) -> str:
    """What the proof of the text section found, in a sentence, with both fingerprints.

    Args:
        identity: `identity` of the text section.
    """
    prints = f"SHA-256 of all logits: graft {_digits(identity, 'grafted')}, base "
    prints += _digits(identity, "base")
    if identity.get("graft_sha256") and identity.get("base_fingerprint"):
        prints += f"; of the weights: graft {_digits(identity, 'graft_sha256')}, base "
        prints += _digits(identity, "base_fingerprint")
    where = f"{identity['prompts']} prompts ({identity['positions']:,} positions)"
    if identity["identical"]:
        return (
            f"The text workflow is the base bit for bit: on {where} every id and every logit is "
            f"the same as of the base loaded without mmgraft ({prints})."
        )
    return (
        f"The text workflow is not the base bit for bit: on {where} logits differ by up to "
        f"{number(identity['max_difference'])}, first in {plain(identity['first_difference'])} "
        f"({prints})."
    )


def _digits(identity: dict[str, Any], name: str) -> str:
    return as_code(str(identity.get(name, "-"))[:SHOWN_DIGITS])


def sense_of(one: SetResult, name: str) -> int:
    """1 where more of a set's score is better, -1 where less is; a harness task says it itself."""
    said = one.settings.get("higher_is_better")
    told = said.get(name.partition(",")[0]) if isinstance(said, dict) else None
    return direction(name) if not isinstance(told, bool) else 1 if told else -1


def text_table(sets: Sequence[SetResult]) -> Table:
    """The graft's text beside the untouched base's: the main score of every set."""
    with_kl = any(KL in one.scores for one in sets)
    columns = ["set", "score", "items", "graft", "base", DIFFERENCE, "verdict"]
    rows = []
    for one in sets:
        change = one.change.get(one.main)
        cells = [
            Cell(plain(one.name)),
            Cell(score_name(one.main)),
            Cell(f"{one.items:,}"),
            score_cell(one.scores[one.main], strong=True),
            _score(one.base.get(one.main)),
            change_cell(change) if change else NOTHING,
            verdict_cell(change, one.main, sense_of(one, one.main)) if change else NOTHING,
        ]
        if with_kl:
            cells.append(_score(one.scores.get(KL)))
        rows.append(cells)
    if with_kl:
        columns.append("KL to the base")
    note = f"Differences are paired: both models answer the same items. {INTERVALS}"
    if any(one.settings.get("base") == EQUAL for one in sets):
        note += " Where the logits were proved to be the base's, one measurement serves both."
    return Table("Text, with the graft and of the untouched base", columns, rows, note)


def vision_table(sets: Sequence[SetResult]) -> Table:
    """Sets with images: the main score with the blind scores beside it."""
    blind = [name for name in BLIND_NAMES if any(name in one.blind for one in sets)]
    blind += sorted({name for one in sets for name in one.blind} - set(blind))
    columns = ["set", "score", "items", "graft", *(BLIND_NAMES.get(name, name) for name in blind)]
    rows = [
        [
            Cell(plain(one.name)),
            Cell(score_name(one.main)),
            Cell(f"{one.items:,}"),
            score_cell(one.scores[one.main], strong=True),
            *(_score(one.blind.get(name, {}).get(one.main)) for name in blind),
        ]
        for one in sets
    ]
    explained = {
        "prior": "`prior` answers each question with its most frequent training answer",
        "no_image": "`no image` is the same model with the image taken out",
    }
    told = [explained[name] for name in blind if name in explained]
    note = f"Blind scores: {'; '.join(told)}. {INTERVALS}" if told else INTERVALS
    return Table("Vision, with the scores of answering blind", columns, rows, note)


def kinds_tables(sets: Iterable[SetResult]) -> list[Table]:
    """A table for every set whose items are of several kinds."""
    tables = []
    for one in sets:
        if len(one.kinds) < 2:
            continue
        rows = []
        for kind, scores in sorted(one.kinds.items()):
            score = scores.get(one.main) or next(iter(scores.values()))
            rows.append([Cell(plain(kind)), Cell(f"{score.count:,}"), score_cell(score)])
        columns = ["kind", "items", score_name(one.main)]
        tables.append(Table(f"{plain(one.name)}, by kind of question", columns, rows))
    return tables


def grid_table(caption: str, sets: Sequence[SetResult], first: str = "set") -> Table:
    """Sets down, all their scores across, and the main one of answering blind."""
    names: list[str] = []
    for one in sets:
        names += [name for name in one.scores if name not in names]
    blind = [name for name in BLIND_NAMES if any(name in one.blind for one in sets)]
    rows = [
        [
            Cell(plain(one.name)),
            Cell(f"{one.items:,}"),
            *(_score(one.scores.get(name), strong=name == one.main) for name in names),
            *(_score(one.blind.get(name, {}).get(one.main)) for name in blind),
        ]
        for one in sets
    ]
    shown = [f"{score_name(sets[0].main)}, {BLIND_NAMES[name]}" for name in blind]
    return Table(caption, [first, "items", *map(score_name, names), *shown], rows, INTERVALS)


def every_score(sections: Sequence[Results]) -> Table:
    """One line for each score of each set of text or vision: detail that other tables leave out."""
    rows = []
    for section in sections:
        for one in section.sets if section.section in ("text", "vision") else ():
            for name, score in one.scores.items():
                change = one.change.get(name) if name != KL else None
                rows.append(
                    [
                        Cell(plain(one.name)),
                        Cell(score_name(name)),
                        score_cell(score),
                        _score(one.base.get(name)),
                        change_cell(change) if change else NOTHING,
                        *(_score(one.blind.get(blind, {}).get(name)) for blind in BLIND_NAMES),
                    ]
                )
    columns = ["set", "score", "graft", "base", DIFFERENCE, *BLIND_NAMES.values()]
    return Table("Every score of every set", columns, rows, INTERVALS, folded=True)


def sources_table(sections: Sequence[Results]) -> Table:
    """What the items were read from, and how answers were made."""
    rows = []
    for section in sections:
        for one in section.sets:
            settings = "; ".join(
                f"{name}: {_setting(value)}" for name, value in one.settings.items()
            )
            rows.append(
                row(plain(one.name), plain(one.metric), plain(one.file),
                    as_code(one.sha256[:SHOWN_DIGITS]), plain(settings) or "-")
            )  # fmt: skip
    columns = ["set", "metric", "file", "SHA-256", "settings"]
    return Table("Items and settings", columns, rows, folded=True)


def against_alone_table(details: dict[str, Any]) -> Table | None:
    """How what stands before the last question of a dialogue changes its scores."""
    rows = []
    for shape, changes in (details.get("against_the_question_alone") or {}).items():
        for name, found in changes.items():
            change = Score.parse(found, shape)
            cells = [Cell(plain(shape)), Cell(score_name(name)), change_cell(change)]
            rows.append([*cells, verdict_cell(change, name)])
    columns = ["shape", "score", "change", "verdict"]
    note = "Paired: the same last question, with what stands before it and without."
    return Table("Against the question alone", columns, rows, note) if rows else None


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " ".join(map(_setting, value))
    return str(value)


def _score(score: Score | None, strong: bool = False) -> Cell:
    return NOTHING if score is None else score_cell(score, strong)
