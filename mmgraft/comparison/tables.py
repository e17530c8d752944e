"""Tables of a comparison: what each arm keeps, sees and costs."""

from collections.abc import Callable, Sequence
from typing import Any

from mmgraft.comparison.measured import MeasuredArm, SetAnswers, set_names
from mmgraft.evaluation.report import words
from mmgraft.evaluation.report.markdown import Table, plain, score_title
from mmgraft.evaluation.report.score_tables import INTERVALS, KL, blind_of, blind_score, set_verdict
from mmgraft.runs.results import Section, SetResult

UNTOUCHED = "the base, untouched"
#: Costs of a training in the main table: keys of its results, and how they are written.
COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters trained": ("trained_parameters", "{:,}".format),
    "training": ("seconds", words.duration),
    "peak memory": ("peak_memory_mb", words.megabytes),
}


def main_table(arms: Sequence[MeasuredArm]) -> Table:
    """Return the table: text before and after, vision and blind, parameters, time and memory."""
    text = {name: results(arms, "text", name) for name in set_names(arms, "text")}
    vision = {name: results(arms, "vision", name) for name in set_names(arms, "vision")}
    columns, rows = ["arm", "identity", "text kept"], [[UNTOUCHED, "-", "-"]]
    rows += [[plain(arm.name), _identity(arm), arm.levels] for arm in arms]

    def add(title: str, base: str, cells: Sequence[str]) -> None:
        columns.append(title)
        for row, cell in zip(rows, [base, *cells], strict=True):
            row.append(cell)

    for name, found in text.items():
        base = next((one.base[one.main] for one in found if one and one.main in one.base), None)
        add(_title(name, found), words.with_interval(base, strong=True), list(map(_after, found)))
    for name, found in text.items():
        if any(one is not None and KL in one.scores for one in found):
            add(f"KL, {plain(name)}", "0", [score(one, KL) for one in found])
    for name, found in vision.items():
        add(_title(name, found), "-", [score(one, strong=True) for one in found])
        for blind, title in blind_of(one for one in found if one is not None).items():
            add(title, "-", [words.with_interval(blind_score(one, blind)) for one in found])
    for title, (key, show) in COSTS.items():
        add(title, "-", [cost(arm, key, show) for arm in arms])
    note = (
        "Identity: whether every logit of text is the base's. Text kept: what the method promises, "
        "as `mmgraft methods` has it. Text marked better or worse is so "
        "beside the untouched base, the paired difference being resolved. The columns after a "
        f"vision set are its blind scores. {INTERVALS}"
    )
    return Table("What each arm keeps, sees and costs", columns, rows, note)


def seeds_table(answers: SetAnswers) -> Table:
    """Return a set's main score over the seeds of each arm; no rows where none was repeated."""
    rows = []
    for arm, runs in answers.seeds.items() if answers.repeats else ():
        each = (words.number(answers.measured[one].values()[answers.main], 3) for one in runs)
        over = [answers.over_seeds(arm), *(answers.of_kind(arm, kind) for kind in answers.kinds)]
        cells = [words.with_interval(one, strong=at == 0) for at, one in enumerate(over)]
        rows.append([plain(arm), str(len(runs)), *cells[:1], ", ".join(each), *cells[1:]])
    kinds = [f"{plain(kind)} ({len(found):,})" for kind, found in answers.kinds.items()]
    main = score_title(answers.main)
    note = f"Seeds and items are resampled together; three seeds say little. {INTERVALS}"
    columns = ["arm", "seeds", main, "by seed", *kinds]
    return Table(f"{plain(answers.spec.name)}: {main} over seeds", columns, rows, note)


def kinds_table(arms: Sequence[MeasuredArm], name: str) -> Table:
    """Return a set's main score by kind of question, arms across."""
    found = {arm.name: arm.set_named("vision", name) for arm in arms if arm.repeats is None}
    sets = {arm: one for arm, one in found.items() if one is not None and one.kinds}
    kinds = sorted({kind for one in sets.values() for kind in one.kinds})
    rows = []
    for kind in kinds:
        scores = [one.kinds.get(kind, {}).get(one.main) for one in sets.values()]
        count = next((score.count for score in scores if score is not None), 0)
        rows.append([plain(kind), f"{count:,}", *map(words.with_interval, scores)])
    main = score_title(next((one.main for one in sets.values()), ""))
    caption = f"{plain(name)}: {main} by kind of question"
    return Table(caption, ["kind", "items", *map(plain, sets)], rows if len(rows) > 1 else [])


def results(arms: Sequence[MeasuredArm], section: Section, name: str) -> list[SetResult | None]:
    """Return a set's results by every arm."""
    return [arm.set_named(section, name) for arm in arms]


def _title(name: str, found: Sequence[SetResult | None]) -> str:
    main = next(one.main for one in found if one is not None)
    return f"{plain(name)}, {score_title(main)}"


def _identity(arm: MeasuredArm) -> str:
    if arm.identity is None:
        return "-"
    if arm.identity["identical"]:
        return "bit for bit"
    return "no: trained" if arm.base_trained else "no"


def _after(one: SetResult | None) -> str:
    """Return a text score, with the word better or worse where its change is resolved."""
    cell = score(one, strong=True)
    word = "" if one is None else set_verdict(one, one.main)
    if word not in ("better", "worse"):
        return cell
    return f"{cell.removesuffix(')')}; {word})" if cell.endswith(")") else f"{cell} ({word})"


def score(one: SetResult | None, name: str | None = None, strong: bool = False) -> str:
    """Return a score of a set with its interval, by default the main one."""
    return words.with_interval(None if one is None else one.scores.get(name or one.main), strong)


def cost(arm: MeasuredArm, key: str, show: Callable[[Any], str]) -> str:
    """Return a number of an arm's training in words."""
    found = arm.training.get(key)
    return show(found) if isinstance(found, int | float) else "-"
