"""A run's report: what was measured of it on one page, as JSON, Markdown and HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from mmgraft import __version__
from mmgraft.atomic import atomic_json, atomic_text, atomic_write
from mmgraft.errors import UsageError
from mmgraft.evaluation.about_run import (
    commands,
    facts_table,
    method_title,
    sets_given,
    shown_name,
    stages_table,
    versions_table,
    without_folders,
)
from mmgraft.evaluation.box_sheet import stays_home
from mmgraft.evaluation.pages.html import render_html
from mmgraft.evaluation.pages.markdown import render_markdown
from mmgraft.evaluation.pages.page import (
    Block,
    Cell,
    Code,
    Page,
    Paragraph,
    Part,
    Picture,
    Table,
    as_code,
    plain,
    row,
)
from mmgraft.evaluation.pages.words import (
    change_cell,
    difference_word,
    listed,
    number,
    score_cell,
    score_name,
)
from mmgraft.evaluation.results import (
    FOLDER,
    SCHEMA_VERSION,
    Results,
    SetResult,
    measured,
)
from mmgraft.evaluation.score_tables import (
    NOTHING,
    against_alone_table,
    every_score,
    grid_table,
    identity_sentence,
    kinds_tables,
    sources_table,
    text_table,
    vision_table,
)
from mmgraft.model.graft_file import GraftFile
from mmgraft.strict import MeasuredModel

REPORT = "report"
METRICS = "metrics.jsonl"
RECIPE = "recipe.yaml"
PICTURES = ("curves", "laws")


class RunReport(MeasuredModel):
    """`report.json`: the run in words, and every section that was measured, whole."""

    schema_version: int = SCHEMA_VERSION
    mmgraft_version: str = __version__
    run: str = Field(description="name of the run's folder")
    method: str
    workflow: str
    base: str
    base_trained: bool
    vision: str
    parameters: dict[str, int] = Field(description="numbers in each part of the graft")
    identity: str | None = Field(default=None, description="the proof about text, in a sentence")
    sections: dict[str, Results]
    repeat: list[str] = Field(default_factory=list, description="commands that do it again")


def write_report(run: Path) -> dict[str, Path]:
    """Write `results/report.json`, `.md` and `.html` of a run from what was measured of it.

    Args:
        run: The run's folder; sections lie in its `results/`.

    Returns:
        The files by what they are: `json`, `md`, `html`, and each picture by its name.

    Raises:
        UsageError: Nothing was measured, or a section is damaged.
        MMGraftError: The disk is full; each file is the old one or the new one, whole.
    """
    from mmgraft.hub.contents import graft_parameters

    record = GraftFile.read(run)
    sections = measured(run)
    if not sections:
        raise UsageError(
            f"nothing was measured of {run}; run `mmgraft eval {run} --text` or `--vision` first"
        )
    parameters = graft_parameters(run)
    page = run_page(run, record, parameters, sections)
    text = next((one for one in sections if one.section == "text"), None)
    report = RunReport(
        run=run.resolve().name,
        method=record.method,
        workflow=record.workflow,
        base=shown_name(record.base.id),
        base_trained=record.base_trained,
        vision=shown_name(record.vision.name),
        parameters=parameters,
        identity=identity_sentence(text.identity) if text and text.identity else None,
        sections={one.section: one for one in sections},
        repeat=commands(run, record, sections),
    )
    return write_page(run / FOLDER, page, report.model_dump(mode="json"))


def write_page(folder: Path, page: Page, data: dict[str, Any]) -> dict[str, Path]:
    """Write a page in its three forms, with its pictures beside the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: folder / f"{REPORT}.{name}" for name in ("json", "md", "html")}
    for picture in page.pictures:
        path = folder / f"{picture.name}.png"
        png = picture.png
        atomic_write(path, lambda temporary, png=png: _write(temporary, png))
        written[picture.name] = path
    atomic_json(written["json"], data)
    atomic_text(written["md"], render_markdown(page))
    atomic_text(written["html"], render_html(page))
    return written


def run_page(
    run: Path, record: GraftFile, parameters: dict[str, int], sections: Sequence[Results]
) -> Page:
    """The page of a run, from its record and what was measured."""
    by_name = {one.section: one for one in sections}
    parts = [_graft_part(record, parameters, by_name.get("training"))]
    for section, make in (("text", _text), ("vision", _vision), ("iit", _iit), ("laws", _laws)):
        results = by_name.get(section)
        if results is not None:
            parts.append(make(run, results))
    curve = _curve(run)
    if curve is not None:
        parts.append(Part("Training curve", [curve]))
    parts.append(_details(sections))
    parts.append(_repeat(run, record, sections))
    name = run.resolve().name
    base = "a base that was trained with it" if record.base_trained else shown_name(record.base.id)
    lead = (
        f"{method_title(record.method)}. Workflow {as_code(record.workflow)} on {plain(base)}, "
        f"seeing with {plain(shown_name(record.vision.name))}."
    )
    return Page(f"{plain(name)}: what it keeps and what it sees", lead, parts, _footer(sections))


def _graft_part(record: GraftFile, parameters: dict[str, int], training: Results | None) -> Part:
    blocks: list[Block] = [facts_table(record, parameters, training)]
    stages = stages_table(record.recipe or {})
    blocks.append(stages or Paragraph("This graft is fresh: nothing in it was trained yet."))
    return Part("What was trained on what", blocks)


def _text(run: Path, results: Results) -> Part:
    blocks: list[Block] = []
    if results.identity is not None:
        tone = "good" if results.identity["identical"] else "unsure"
        blocks.append(Paragraph(identity_sentence(results.identity), tone))
    if results.sets:
        blocks.append(text_table(results.sets))
    return Part("Text", blocks)


def _vision(run: Path, results: Results) -> Part:
    blocks: list[Block] = [vision_table(results.sets) if results.sets else _empty()]
    blocks += kinds_tables(results.sets)
    blocks += [
        _sheet(run, one) for one in results.sets if one.sheet and (run / one.sheet).is_file()
    ]
    return Part("Vision", blocks)


def _sheet(run: Path, one: SetResult) -> Picture:
    """A contact sheet of boxes; in the page itself only where its pictures may go along."""
    assert one.sheet is not None
    path, home = run / one.sheet, stays_home(one.sheet)
    name = plain(one.name)
    told = (
        f"Items of {name}, drawn by chance whatever was answered. The true box has an unbroken "
        "green line, the answered one a dashed blue line; a crossed square marks an answer that "
        "is no box."
    )
    if home:
        told += " The picture is a file beside this page and does not go along with it."
    return Picture(
        path.relative_to(run / FOLDER).with_suffix("").as_posix(),
        path.read_bytes(),
        f"Pictures of {name} with the true box and the answered one, the question and the IoU; "
        "the scores above are of all items.",
        told,
        embedded=not home,
    )


def _iit(run: Path, results: Results) -> Part:
    told = Paragraph(
        "Dialogues of text turns (T) and turns with an image (V); the last question is scored."
    )
    blocks: list[Block] = [told]
    if results.sets:
        blocks.append(grid_table("Each shape", results.sets, "shape"))
    alone = against_alone_table(results.details)
    if alone is not None:
        blocks.append(alone)
    return Part("Interleaved dialogues", blocks)


def _laws(run: Path, results: Results) -> Part:
    from mmgraft.evaluation.plots import laws_plot

    name = run.resolve().name
    picture = Picture(
        "laws",
        laws_plot({name: results}),
        "Attention weights of each layer on the text before the image, on the image and on the "
        "text after it, layer by layer.",
        "Attention weights layer by layer. The attention shift is one minus the correlation of "
        "the weights before the image with those after it, averaged over samples.",
    )
    return Part("Attention", [picture, shift_table({name: results})])


def shift_table(arms: dict[str, Results]) -> Table:
    """The attention shift of each run, by the layers and branches that were summed."""
    rows = []
    for name, results in arms.items():
        for one in results.sets:
            for score, value in one.scores.items():
                change = one.change.get(score)
                rows.append(
                    [
                        *row(plain(name), score_name(score.removeprefix("shift_"))),
                        Cell(f"{value.count:,}"),
                        score_cell(value, strong=score == one.main),
                        change_cell(change) if change else NOTHING,
                        Cell(difference_word(change)) if change else NOTHING,
                    ]
                )
    columns = ["run", "summed over", "samples", "shift", "change by the graft", "verdict"]
    note = "The change is paired, sample by sample, against the base with the projector alone."
    return Table("Attention shift", columns, rows, note)


def _curve(run: Path) -> Picture | None:
    path = run / METRICS
    last = last_losses(path) if path.is_file() else []
    if not last:
        return None
    from mmgraft.evaluation.plots import training_curves

    told = ", ".join(f"stage {plain(stage)} ended at {number(loss)}" for stage, loss in last)
    return Picture(
        "curves",
        training_curves({run.resolve().name: path}),
        f"Training loss by step: {told}.",
        f"Training loss by step; {told}.",
    )


def last_losses(path: Path) -> list[tuple[str, float]]:
    """The last loss of each stage of a `metrics.jsonl`; lines cut by a kill are passed over."""
    found: dict[str, float] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("loss"), int | float):
            found[str(line.get("stage", "-"))] = float(line["loss"])
    return list(found.items())


def _details(sections: Sequence[Results]) -> Part:
    blocks: list[Block] = []
    if any(one.sets for one in sections):
        blocks += [every_score(sections), sources_table(sections)]
    return Part("In detail", [*blocks, versions_table(sections)])


def _repeat(run: Path, record: GraftFile, sections: Sequence[Results]) -> Part:
    recipe = run / RECIPE
    told = "These commands make the run and measure it again"
    told += ", with the recipe below them." if recipe.is_file() else "."
    others = sets_given(record, sections)
    if others:
        told += (
            f" The recipe does not name the sets {listed([as_code(name) for name in others])}: "
            "they were given to `mmgraft eval` by `--sets`, `--data` or `--harness`; their files "
            "and settings stand above."
        )
    blocks: list[Block] = [Paragraph(told), Code("\n".join(commands(run, record, sections)))]
    if recipe.is_file():
        text = without_folders(recipe.read_text(encoding="utf-8"))
        blocks.append(Code(text.rstrip(), "yaml"))
    return Part("How to repeat it", blocks)


def _footer(sections: Sequence[Results]) -> str:
    versions = sorted({one.mmgraft_version for one in sections})
    return f"Measured with mmgraft {', '.join(versions)}; written by mmgraft {__version__}."


def _empty() -> Paragraph:
    return Paragraph("No set was asked.")


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
