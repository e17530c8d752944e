"""A comparison's report: what the arms keep, see and cost, as JSON, Markdown and one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from mmgraft import __version__
from mmgraft.comparison.answers import SetAnswers, read_answers
from mmgraft.comparison.claims import Claim, claims
from mmgraft.comparison.files import COMPARISON, Phase, read_comparison
from mmgraft.comparison.report_arms import MeasuredArm, read_arms, set_names
from mmgraft.comparison.report_sheet import sheet_blocks
from mmgraft.comparison.report_tables import (
    arms_table,
    claims_table,
    costs_table,
    dialogues_table,
    differences_table,
    kinds_table,
    main_table,
    over_blind_table,
    text_changes,
)
from mmgraft.comparison.spec import Comparison
from mmgraft.errors import UsageError
from mmgraft.evaluation.about_run import shown_name, versions_table, without_folders
from mmgraft.evaluation.origin import as_score
from mmgraft.evaluation.pages.page import (
    Block,
    Code,
    Page,
    Paragraph,
    Part,
    Picture,
    Points,
    as_code,
    plain,
)
from mmgraft.evaluation.pages.words import listed, number, verdict
from mmgraft.evaluation.report import last_losses, shift_table, write_page
from mmgraft.evaluation.results import SCHEMA_VERSION, Results, Score, Section
from mmgraft.evaluation.score_tables import identity_sentence
from mmgraft.strict import MeasuredModel


class ArmReport(MeasuredModel):
    """One arm."""

    description: str
    method: str | None = Field(description="None: the arm was not begun")
    base_trained: bool
    done: list[Phase]
    sections: dict[Section, Results]


class Difference(MeasuredModel):
    """Two arms, or an arm and its blind score, on the same items of a set."""

    set: str
    score: str
    first: str = Field(description="an arm")
    second: str = Field(description="another arm, or `prior` or `no_image` of the first one")
    change: Score = Field(description="first minus second")
    verdict: str = Field(description="better, worse, the same, not resolved; of the first")


class ComparisonReport(MeasuredModel):
    """`report.json` of a comparison."""

    schema_version: int = SCHEMA_VERSION
    mmgraft_version: str = __version__
    name: str
    description: str
    base: str
    vision: str
    seed: int
    arms: dict[str, ArmReport]
    differences: list[Difference]
    claims: list[Claim]
    notes: list[str] = Field(description="what could not be compared, and why")


def write_comparison_report(out: Path) -> dict[str, Path]:
    """Write `OUT/report.json`, `.md` and `.html` from what the arms have left.

    Arms that are not done yet are shown as far as they have come.

    Args:
        out: The comparison's folder.

    Returns:
        The files by what they are: `json`, `md`, `html`, and each picture by its name.

    Raises:
        UsageError: `out` holds no comparison, or a result in it is damaged.
        MMGraftError: The disk is full; each file is the old one or the new one, whole.
    """
    comparison = read_comparison(out)
    arms = read_arms(out, comparison)
    answers, problems = _answers(comparison, arms)
    problems += _asked_otherwise(arms)
    found = claims(arms, [one for one in answers if one.spec.modality == "image"])
    report = ComparisonReport(
        name=comparison.name,
        description=comparison.description,
        base=shown_name(comparison.base),
        vision=_vision_name(comparison),
        seed=comparison.seed,
        arms={
            arm.name: ArmReport(
                description=arm.description,
                method=arm.method,
                base_trained=arm.base_trained,
                done=list(arm.done),
                sections=arm.sections,
            )
            for arm in arms
        },
        differences=[one for each in answers for one in _differences(each)],
        claims=found,
        notes=[*problems, *(note for each in answers for note in _left_out(each))],
    )
    page = comparison_page(out, comparison, arms, answers, found, problems)
    return write_page(out, page, report.model_dump(mode="json"))


def comparison_page(
    out: Path,
    comparison: Comparison,
    arms: Sequence[MeasuredArm],
    answers: Sequence[SetAnswers],
    found: Sequence[Claim],
    problems: Sequence[str],
) -> Page:
    """The page of a comparison."""
    parts = [
        Part("The table", [main_table(arms)]),
        Part("Claims", [claims_table(found)] if found else [_not_yet("No claim was tested yet.")]),
        Part("Text", list(_text(arms, answers))),
        Part("Vision", list(_vision(arms, answers, problems))),
        *_dialogues(arms),
        *_attention(arms),
        *_curves(arms),
        Part("What was compared", list(_compared(comparison, arms))),
        _repeat(out, comparison),
    ]
    names = listed([plain(arm.name) for arm in arms])
    lead = (
        f"{plain(comparison.description)}. " if comparison.description else ""
    ) + f"{len(arms)} arms: {names}."
    return Page(
        f"{plain(comparison.name)}: what is kept and what is seen",
        lead,
        [part for part in parts if part.blocks],
        f"Written by mmgraft {__version__}.",
    )


def _answers(
    comparison: Comparison, arms: Sequence[MeasuredArm]
) -> tuple[list[SetAnswers], list[str]]:
    """Kept answers to every set, and which sets cannot be compared, and why."""
    answers: list[SetAnswers] = []
    problems: list[str] = []
    for spec in comparison.evaluation:
        try:
            found = read_answers(spec, arms)
        except UsageError as error:
            told = without_folders(str(error))
            problems.append(f"{spec.name}: arms cannot be compared item by item: {told}")
            continue
        if found is not None:
            answers.append(found)
    return answers, problems


def _asked_otherwise(arms: Sequence[MeasuredArm]) -> Iterator[str]:
    """Sets of which not all arms were asked the same items, as after a trial of one arm."""
    sections: tuple[Section, ...] = ("text", "vision", "iit")
    for section in sections:
        for name in set_names(arms, section):
            found = {arm.name: arm.set_named(section, name) for arm in arms}
            items = {arm: (one.sha256, one.items) for arm, one in found.items() if one is not None}
            if len(set(items.values())) > 1:
                told = ", ".join(f"{arm} {count:,}" for arm, (_, count) in items.items())
                yield (
                    f"{name}: the arms were not asked the same items ({told}), so their scores in "
                    "the table do not compare; the same command without --only asks them alike"
                )


def _left_out(answers: SetAnswers) -> list[str]:
    name = answers.spec.name
    return [f"{name}: {arm} is left out of these: {why}" for arm, why in answers.missing.items()]


def _differences(answers: SetAnswers) -> Iterator[Difference]:
    pairs = [(a, b, answers.difference(a, b)) for a, b in answers.pairs()]
    for arm in answers.measured:
        pairs += [(arm, blind, change) for blind, change in answers.over_blind(arm).items()]
    for first, second, change in pairs:
        yield Difference(
            set=answers.spec.name,
            score=answers.main,
            first=first,
            second=second,
            change=as_score(change),
            verdict=verdict(change, answers.main)[0],
        )


def _text(arms: Sequence[MeasuredArm], answers: Sequence[SetAnswers]) -> Iterator[Block]:
    proofs = [
        f"{as_code(arm.name)}: {identity_sentence(arm.identity)}" for arm in arms if arm.identity
    ]
    if proofs:
        yield Points(proofs)
    tables = [text_changes(arms)]
    tables += [differences_table(one) for one in answers if one.spec.modality == "text"]
    yield from (table for table in tables if table is not None)


def _vision(
    arms: Sequence[MeasuredArm], answers: Sequence[SetAnswers], problems: Sequence[str]
) -> Iterator[Block]:
    for each in answers:
        if each.spec.modality == "text":
            continue
        for table in (differences_table(each), over_blind_table(each)):
            if table is not None:
                yield table
        if each.missing:
            yield Points([plain(note) for note in _left_out(each)])
        yield from sheet_blocks(each)
    for name in set_names(arms, "vision"):
        table = kinds_table(arms, name)
        if table is not None:
            yield table
    if problems:
        yield Points([plain(problem) for problem in problems])


def _dialogues(arms: Sequence[MeasuredArm]) -> Iterator[Part]:
    table = dialogues_table(arms)
    if table is not None:
        yield Part("Interleaved dialogues", [table])


def _attention(arms: Sequence[MeasuredArm]) -> Iterator[Part]:
    sections = {arm.name: arm.sections["laws"] for arm in arms if "laws" in arm.sections}
    if not sections:
        return
    from mmgraft.evaluation.plots import laws_plot

    picture = Picture(
        "laws",
        laws_plot(sections),
        f"Attention by layer on the text before the image, on the image and on the text after it, "
        f"for {listed([plain(name) for name in sections])}; the table below it has the shifts.",
        "A row an arm. The first panel is the base with the arm's projector alone, the others have "
        "the graft in the path.",
    )
    yield Part("Attention", [picture, shift_table(sections)])


def _curves(arms: Sequence[MeasuredArm]) -> Iterator[Part]:
    trained = {arm.name: (arm.metrics, last_losses(arm.metrics)) for arm in arms if arm.metrics}
    trained = {name: found for name, found in trained.items() if found[1]}
    if not trained:
        return
    from mmgraft.evaluation.plots import training_curves

    told = [
        f"{plain(name)} ended at {number(losses[-1][1])}" for name, (_, losses) in trained.items()
    ]
    picture = Picture(
        "curves",
        training_curves({name: path for name, (path, _) in trained.items()}),
        f"Training loss by step: {listed(told)}.",
        f"Training loss by step, stages one after another. The last logged losses: {listed(told)}.",
    )
    yield Part("Training curves", [picture])


def _compared(comparison: Comparison, arms: Sequence[MeasuredArm]) -> Iterator[Block]:
    yield Paragraph(
        f"All arms: base {as_code(shown_name(comparison.base))}, vision tower "
        f"{as_code(_vision_name(comparison))}, seed {comparison.seed}, the same data."
    )
    yield arms_table(arms)
    costs = costs_table(arms)
    if costs is not None:
        yield costs
    sections = [one for arm in arms for one in arm.sections.values()]
    if sections:
        yield versions_table(sections)


def _repeat(out: Path, comparison: Comparison) -> Part:
    name = out.resolve().name
    return Part(
        "How to repeat it",
        [
            Paragraph(
                f"The folder holds the whole comparison in {as_code(COMPARISON)}; the same command "
                "goes on where it was stopped, and does nothing twice."
            ),
            Code(f"mmgraft compare {name}/{COMPARISON} --out {name}"),
        ],
    )


def _vision_name(comparison: Comparison) -> str:
    vision = comparison.vision
    return shown_name(vision if isinstance(vision, str) else vision.name)


def _not_yet(text: str) -> Paragraph:
    return Paragraph(text, "unsure")
