"""Tables of a run's results, for its report, its model card and a comparison. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mmgraft.evaluation.pages.page import Cell, Table, as_code, plain, row
from mmgraft.evaluation.pages.words import (
    MINUS,
    change_cell,
    number,
    score_cell,
    score_name,
    verdict_cell,
)
from mmgraft.evaluation.results import Results, Score, SetResult

NOTHING = Cell("-")
KL = "kl_to_base"
INTERVALS = (
    "Ranges are 95 % bootstrap intervals over the items; items about one picture are drawn "
    "together."
)
SHOWN_DIGITS = 16
BLIND_NAMES = {"prior": "prior", "no_image": "no image"}


def identity_sentence(identity: dict[str, Any]) -> str:
    """What the proof of the text section found, in a sentence, with both fingerprints.

    Args:
        identity: `IdentityReport.as_dict()`; further keys are left to the JSON.
    """
    ours, theirs = (str(identity.get(name, ""))[:SHOWN_DIGITS] for name in ("grafted", "base"))
    prints = f"SHA-256 of all logits: graft {as_code(ours)}, base {as_code(theirs)}"
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


def text_table(sets: Sequence[SetResult]) -> Table:
    """The graft's text beside the untouched base's: the main score of every set."""
    with_kl = any(KL in one.scores for one in sets)
    columns = ["set", "score", "items", "graft", "base", f"graft {MINUS} base", "verdict"]
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
            verdict_cell(change, one.main) if change else NOTHING,
        ]
        if with_kl:
            cells.append(_score(one.scores.get(KL)))
        rows.append(cells)
    if with_kl:
        columns.append("KL to the base")
    note = f"Differences are paired: both models answer the same items. {INTERVALS}"
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
    """Sets down, all their scores across."""
    names: list[str] = []
    for one in sets:
        names += [name for name in one.scores if name not in names]
    rows = [
        [
            Cell(plain(one.name)),
            Cell(f"{one.items:,}"),
            *(_score(one.scores.get(name), strong=name == one.main) for name in names),
        ]
        for one in sets
    ]
    return Table(caption, [first, "items", *map(score_name, names)], rows, INTERVALS)


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
    columns = ["set", "score", "graft", "base", f"graft {MINUS} base", *BLIND_NAMES.values()]
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
