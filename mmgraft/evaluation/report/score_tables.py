"""Tables of a run's results, for its report, its model card and a comparison. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mmgraft.evaluation.report import words
from mmgraft.evaluation.report.markdown import Table, as_code, plain
from mmgraft.runs.results import Results, Score, SetResult

DIFFERENCE = f"graft\N{NO-BREAK SPACE}{words.MINUS}\N{NO-BREAK SPACE}base"
KL = "kl_to_base"
INTERVALS = (
    "Ranges are 95 % bootstrap intervals over the items; items about one image are resampled "
    "together."
)
SHOWN_DIGITS = 16
EQUAL = "equal by identity"
"""What a set's settings say where the base's scores were not measured a second time."""

BLIND_NAMES = {"prior": "prior", "no_image": "no image"}


def identity_sentence(identity: dict[str, Any]) -> str:
    """Return the result of comparing the text workflow with the base, with all fingerprints.

    Args:
        identity: ``identity`` of the text section.
    """

    def digits(name: str) -> str:
        return as_code(str(identity.get(name, "-"))[:SHOWN_DIGITS])

    prints = f"SHA-256 of all logits: graft {digits('grafted')}, base {digits('base')}"
    if identity.get("graft_sha256") and identity.get("base_fingerprint"):
        prints += f"; of the weights: graft {digits('graft_sha256')}"
        prints += f", base {digits('base_fingerprint')}"
    where = f"on {identity['prompts']} prompts ({identity['positions']:,} positions)"
    if identity["identical"]:
        found = (
            f"is the base bit for bit: {where} every id and every logit is the same as of the "
            "base loaded without mmgraft"
        )
    else:
        found = (
            f"is not the base bit for bit: {where} logits differ by up to "
            f"{words.number(identity['max_difference'])}, first in "
            f"{plain(identity['first_difference'])}"
        )
    return f"The text workflow {found} ({prints})."


def score_title(name: str) -> str:
    """Return the name of a score as Markdown."""
    return plain(words.score_name(name))


def set_verdict(one: SetResult, name: str) -> str:
    """Return what the change of a set's score comes to; an lm-eval task says what is better."""
    stated = one.settings.get("higher_is_better")
    higher = stated.get(name.partition(",")[0]) if isinstance(stated, dict) else None
    sense = words.direction(name) if not isinstance(higher, bool) else 1 if higher else -1
    return words.verdict(one.change.get(name), name, sense)


def blind_score(one: SetResult | None, blind: str, name: str | None = None) -> Score | None:
    """Return a set's score of answering blind; by default the main one."""
    return None if one is None else one.blind.get(blind, {}).get(name or one.main)


def blind_of(sets: Iterable[SetResult]) -> list[str]:
    """Return which blind scores sets have, those of :data:`BLIND_NAMES` first."""
    found = {name for one in sets for name in one.blind}
    return [name for name in BLIND_NAMES if name in found] + sorted(found - set(BLIND_NAMES))


def text_table(sets: Sequence[SetResult]) -> Table:
    """Return the main score of every text set, of the graft and of the untouched base."""
    with_kl = any(KL in one.scores for one in sets)
    columns = ["set", "score", "items", "graft", "base", DIFFERENCE, "verdict"]
    columns += ["KL to the base"] * with_kl
    rows = [
        [
            *_set_cells(one),
            words.with_interval(one.base.get(one.main)),
            words.change_with_interval(one.change.get(one.main)),
            set_verdict(one, one.main),
            *[words.with_interval(one.scores.get(KL))] * with_kl,
        ]
        for one in sets
    ]
    note = f"Differences are paired: both models answer the same items. {INTERVALS}"
    if any(one.settings.get("base") == EQUAL for one in sets):
        note += " Where the logits were proved to be the base's, one measurement serves both."
    return Table("Text, with the graft and of the untouched base", columns, rows, note)


def vision_table(sets: Sequence[SetResult]) -> Table:
    """Return the main score of every set with images, with the blind scores beside it."""
    blind = blind_of(sets)
    columns = ["set", "score", "items", "graft", *(BLIND_NAMES.get(name, name) for name in blind)]
    rows = [
        [*_set_cells(one), *(words.with_interval(blind_score(one, name)) for name in blind)]
        for one in sets
    ]
    explained = {
        "prior": "`prior` answers each question with its most frequent training answer",
        "no_image": "`no image` is the same model with the image taken out",
    }
    known = "; ".join(explained[name] for name in blind if name in explained)
    note = f"Blind scores: {known}. {INTERVALS}" if known else INTERVALS
    return Table("Vision, with the scores of answering blind", columns, rows, note)


def kinds_tables(sets: Iterable[SetResult]) -> list[Table]:
    """Return a table for every set whose items are of several kinds."""
    tables = []
    for one in sets:
        found = {
            kind: scores.get(one.main) or next(iter(scores.values()))
            for kind, scores in sorted(one.kinds.items())
        }
        rows = [
            [plain(kind), f"{of.count:,}", words.with_interval(of)] for kind, of in found.items()
        ]
        if len(rows) > 1:
            columns = ["kind", "items", score_title(one.main)]
            tables.append(Table(f"{plain(one.name)}, by kind of question", columns, rows))
    return tables


def dialogues_table(sets: Sequence[SetResult]) -> Table:
    """Return all scores of every shape of dialogue, and the main one of answering blind."""
    names = list(dict.fromkeys(name for one in sets for name in one.scores))
    blind = blind_of(sets)
    rows = [
        [
            plain(one.name),
            f"{one.items:,}",
            *(words.with_interval(one.scores.get(name), strong=name == one.main) for name in names),
            *(words.with_interval(blind_score(one, name)) for name in blind),
        ]
        for one in sets
    ]
    shown = [f"{score_title(sets[0].main)}, {BLIND_NAMES.get(name, name)}" for name in blind]
    columns = ["shape", "items", *map(score_title, names), *shown]
    return Table("The last question of each shape", columns, rows, INTERVALS)


def against_alone_table(details: dict[str, Any]) -> Table:
    """Return how the earlier turns of a dialogue change the scores of its last question."""
    rows = []
    for shape, changes in (details.get("against_the_question_alone") or {}).items():
        for name, found in changes.items():
            change = Score.parse(found, shape)
            cells = [words.change_with_interval(change), words.verdict(change, name)]
            rows.append([plain(shape), score_title(name), *cells])
    columns = ["shape", "score", "change", "verdict"]
    note = "Paired: the same last question, with the turns before it and without."
    return Table("Against the question alone", columns, rows, note)


def shift_table(sections: dict[str, Results]) -> Table:
    """Return the attention shift of each run, by the layers and branches that were summed."""
    rows = [
        [
            plain(run),
            score_title(name.removeprefix("shift_")),
            f"{score.count:,}",
            words.with_interval(score, strong=name == one.main),
            words.change_with_interval(one.change.get(name)),
            words.verdict(one.change.get(name), name, 0),
        ]
        for run, results in sections.items()
        for one in results.sets
        for name, score in one.scores.items()
    ]
    columns = ["run", "summed over", "samples", "shift", "change by the graft", "verdict"]
    note = "The change is paired, sample by sample, against the base with the projector alone."
    return Table("Attention shift", columns, rows, note)


def every_score(sections: Sequence[Results]) -> Table:
    """Return one row for each score of each set of text or vision."""
    rows = [
        [
            plain(one.name),
            score_title(name),
            words.with_interval(score),
            words.with_interval(one.base.get(name)),
            words.change_with_interval(None if name == KL else one.change.get(name)),
            *(words.with_interval(blind_score(one, blind, name)) for blind in BLIND_NAMES),
        ]
        for section in sections
        if section.section in ("text", "vision")
        for one in section.sets
        for name, score in one.scores.items()
    ]
    columns = ["set", "score", "graft", "base", DIFFERENCE, *BLIND_NAMES.values()]
    return Table("Every score of every set", columns, rows, INTERVALS, folded=True)


def _set_cells(one: SetResult) -> list[str]:
    score = words.with_interval(one.scores[one.main], strong=True)
    return [plain(one.name), score_title(one.main), f"{one.items:,}", score]
