"""A comparison's report: what the arms keep, see and cost, as JSON, Markdown and one HTML page."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from mmgraft.comparison import tables
from mmgraft.comparison.files import Phase, read_comparison
from mmgraft.comparison.measured import MeasuredArm, SetAnswers, read_answers, read_arms, set_names
from mmgraft.comparison.spec import Comparison
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.files import data_file
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.items.source_licence import FREE, stated_licences
from mmgraft.evaluation.metrics.scoring import measure_answers
from mmgraft.evaluation.report import about_run, score_tables, sheets
from mmgraft.evaluation.report.markdown import Table, plain, render
from mmgraft.evaluation.report.report import BESIDE, plots_of, write_page
from mmgraft.evaluation.report.words import listed, number, verdict
from mmgraft.frozen import Frozen
from mmgraft.runs.results import SCHEMA_VERSION, Results, Score, Section
from mmgraft.strict import MeasuredModel
from mmgraft.version import __version__


class ArmReport(MeasuredModel):
    """One arm."""

    description: str
    method: str | None = Field(description="None: the arm was not started")
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
    """``report.json`` of a comparison."""

    schema_version: int = SCHEMA_VERSION
    mmgraft_version: str = __version__
    name: str
    description: str
    base: str
    vision: str
    seed: int | list[int]
    arms: dict[str, ArmReport]
    differences: list[Difference]
    notes: list[str] = Field(description="sets that could not be compared, and the reasons")


def write_comparison_report(out: Path) -> dict[str, Path]:
    """Write ``OUT/report.json``, ``.md`` and ``.html`` from what was measured of the arms.

    Arms that are not done yet are shown as far as they have come.

    Args:
        out: The comparison's folder.

    Returns:
        The files by what they are: ``json``, ``md``, ``html``, and each image by its name.

    Raises:
        UsageError: ``out`` holds no comparison, or a result in it is damaged.
        MMGraftError: The disk is full; each file is the old one or the new one, whole.
    """
    comparison = read_comparison(out)
    vision = comparison.vision
    arms = read_arms(out, comparison)
    answers, problems = _answers(comparison, arms)
    problems += _other_items(arms)
    report = ComparisonReport(
        name=comparison.name,
        description=comparison.description,
        base=about_run.shown_name(comparison.base),
        vision=about_run.shown_name(vision if isinstance(vision, str) else vision.name),
        seed=comparison.seed,
        arms={arm.name: ArmReport.model_validate(arm, from_attributes=True) for arm in arms},
        differences=[one for each in answers for one in _differences(each)],
        notes=[*problems, *(note for each in answers for note in each.notes)],
    )
    return _write(out, report, arms, answers, problems)


def _write(
    out: Path,
    report: ComparisonReport,
    arms: Sequence[MeasuredArm],
    answers: Sequence[SetAnswers],
    problems: Sequence[str],
) -> dict[str, Path]:
    of_images = [one for one in answers if one.spec.modality == "image"]
    drawn = {one.spec.name: answer_sheet(one) for one in of_images}
    laws = {arm.name: arm.sections["laws"] for arm in arms if "laws" in arm.sections}
    losses = {arm.name: about_run.last_losses(arm.run / about_run.METRICS) for arm in arms}
    curves = {arm.name: arm.run / about_run.METRICS for arm in arms if losses[arm.name]}
    ended = [f"{plain(name)} ended at {number([*losses[name].values()][-1])}" for name in curves]
    markdown = render(
        "comparison/report.md.jinja",
        report=report,
        arms=arms,
        tables=tables,
        scores=score_tables,
        text=[one for one in answers if one.spec.modality == "text"],
        vision=of_images,
        sheets=drawn,
        beside=BESIDE,
        kinds_tables=[tables.kinds_table(arms, name) for name in set_names(arms, "vision")],
        problems=problems,
        laws=laws,
        curves=listed(ended),
        about=about_run,
        versions=about_run.versions(one for arm in arms for one in arm.sections.values()),
        folder=out.resolve().name,
    )
    images = {f"answers-{name}": sheet.png for name, sheet in drawn.items() if sheet}
    linked = [f"answers-{name}" for name, sheet in drawn.items() if sheet and sheet.private]
    repeats = {arm.name: arm.repeats for arm in arms if arm.repeats}
    images |= plots_of(laws, curves, repeats)
    return write_page(out, markdown, report.model_dump(mode="json"), images, linked)


def _answers(
    comparison: Comparison, arms: Sequence[MeasuredArm]
) -> tuple[list[SetAnswers], list[str]]:
    """Return the kept answers to every set, and which sets cannot be compared, and why."""
    answers: list[SetAnswers] = []
    problems: list[str] = []
    for spec in comparison.evaluation:
        try:
            found = read_answers(spec, arms)
        except UsageError as error:
            why = about_run.without_folders(str(error))
            problems.append(f"{spec.name}: arms cannot be compared item by item: {why}")
            continue
        if found is not None:
            answers.append(found)
    return answers, problems


def _other_items(arms: Sequence[MeasuredArm]) -> Iterator[str]:
    """Name sets that arms were evaluated on with other items, as after a trial of one arm."""
    sections: tuple[Section, ...] = ("text", "vision", "iit")
    for section in sections:
        for name in set_names(arms, section):
            found = {arm.name: arm.set_named(section, name) for arm in arms}
            items = {arm: (one.sha256, one.items) for arm, one in found.items() if one is not None}
            if len(set(items.values())) > 1:
                counts = ", ".join(f"{arm} {count:,}" for arm, (_, count) in items.items())
                yield (
                    f"{name}: the arms were not evaluated on the same items ({counts}), so their "
                    "scores in the table do not compare; the same command without --only "
                    "evaluates them alike"
                )


def _differences(answers: SetAnswers) -> Iterator[Difference]:
    for first, second, change in [*answers.differences, *answers.over_blind]:
        yield Difference(
            set=answers.spec.name,
            score=answers.main,
            first=first,
            second=second,
            change=change,
            verdict=verdict(change, answers.main),
        )


class AnswerSheet(Frozen):
    """The contact sheet of a set: the same questions, and what each arm answered.

    Attributes:
        png: The image.
        table: The same in words, for readers who cannot see it.
        private: Whether a licence forbids to pass its images on.
    """

    png: bytes
    table: Table
    private: bool


def answer_sheet(answers: SetAnswers) -> AnswerSheet | None:
    """Draw the contact sheet of a set with images; None where no item has one.

    Its items are sampled by a fixed seed, whatever was answered.

    Raises:
        UsageError: An image cannot be read.
    """
    indices = sheets.sampled_indices(answers.items)
    if not indices:
        return None
    items = [_sheet_item(answers, index) for index in indices]
    licences = stated_licences(data_file(answers.spec), [answers.items[one] for one in indices])
    rows = [
        [plain(one.question), plain(one.truth), *(_in_words(each) for each in one.answers)]
        for one in items
    ]
    columns = ["question", "truth", *map(plain, answers.texts)]
    caption = f"{plain(answers.spec.name)}, the answers in words"
    table = Table(caption, columns, rows, folded=True)
    return AnswerSheet(
        sheets.sheet_png(sheets.draw_sheet(items)), table, not licences <= {*FREE, None}
    )


def _sheet_item(answers: SetAnswers, index: int) -> sheets.SheetItem:
    spec, item = answers.spec, answers.items[index]
    given = [
        sheets.box_answer(arm, spec, item, texts[index])
        if spec.metric == "box"
        else sheets.Answer(arm, texts[index], _is_correct(answers, texts[index], item))
        for arm, texts in answers.texts.items()
    ]
    return sheets.SheetItem(sheets.first_image(item), item.question, _truth(item), given, item.box)


def _is_correct(answers: SetAnswers, text: str, item: Item) -> bool | None:
    if answers.spec.metric == "caption":
        return None
    if answers.spec.metric == "choice":
        return item.gold is not None and text == item.options[item.gold]
    found = measure_answers(answers.spec, [item], [text])
    return found.values()[found.main] >= 0.5


def _truth(item: Item) -> str:
    if item.gold is not None:
        return item.options[item.gold]
    if item.box is not None:
        return f"[{', '.join(f'{value:.0f}' for value in item.box)}]"
    # Of ten people's answers the most frequent, the first of equally frequent ones.
    return max(item.answers, key=item.answers.count, default="-")


def _in_words(answer: sheets.Answer) -> str:
    text = plain(answer.text) or "(nothing)"
    if answer.correct is None:
        return text
    note = f", {answer.note}" if answer.note else ""
    return f"{text} ({'right' if answer.correct else 'wrong'}{note})"
