"""A run's report: what was measured of it, as JSON, Markdown and one HTML page."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from mmgraft.atomic import atomic_bytes, atomic_json, atomic_text
from mmgraft.errors import UsageError
from mmgraft.evaluation.report import about_run, score_tables
from mmgraft.evaluation.report.about_run import METRICS, shown_name, without_folders
from mmgraft.evaluation.report.markdown import render, render_html
from mmgraft.evaluation.report.sheets import is_private
from mmgraft.model.files.graft_file import OWN_BASE, GraftFile
from mmgraft.model.files.summary import graft_parts
from mmgraft.runs.contents import RECIPE
from mmgraft.runs.results import FOLDER, SCHEMA_VERSION, Results, measured
from mmgraft.strict import MeasuredModel, about
from mmgraft.textfiles import read_text
from mmgraft.version import __version__

REPORT = "report"
BESIDE = "The image is a file beside this page and does not go along with it."


class RunReport(MeasuredModel):
    """``report.json``: the run in words, and every section that was measured, whole."""

    schema_version: int = SCHEMA_VERSION
    mmgraft_version: str = __version__
    run: str = Field(description="name of the run's folder")
    method: str
    workflow: str
    base: str
    base_trained: bool
    vision: str
    parameters: dict[str, int] = Field(description="numbers in each part of the graft")
    identity: str | None = about("the proof about text, in a sentence")
    sections: dict[str, Results]
    repeat: list[str] = about("commands that do it again", list)


def write_report(run: Path) -> dict[str, Path]:
    """Write ``results/report.json``, ``.md`` and ``.html`` from what was measured of a run.

    Args:
        run: The run's folder; sections are in its ``results/``.

    Returns:
        The files by what they are: ``json``, ``md``, ``html``, and each image by its name.

    Raises:
        UsageError: Nothing was measured, or a section is damaged.
        MMGraftError: The disk is full; each file is the old one or the new one, whole.
    """
    record = GraftFile.read(run)
    sections = {one.section: one for one in measured(run)}
    if not sections:
        raise UsageError(
            f"nothing was measured of {run}; run `mmgraft eval {run} --text` or `--vision` first"
        )
    text = sections.get("text")
    report = RunReport(
        run=run.resolve().name,
        method=record.method,
        workflow=record.workflow,
        base=shown_name(record.base.id),
        base_trained=record.base_trained,
        vision=shown_name(record.vision.name),
        parameters={row.part: row.parameters for row in graft_parts(run, record.method)},
        identity=score_tables.identity_sentence(text.identity) if text and text.identity else None,
        sections={**sections},
        repeat=about_run.commands(run, record, list(sections.values())),
    )
    laws = {report.run: sections["laws"]} if "laws" in sections else {}
    curves = {report.run: run / METRICS} if about_run.last_losses(run / METRICS) else {}
    images = plots_of(laws, curves, {})
    sheets: dict[str, bool] = {}  # whether their images have to stay in the run
    for one in sections["vision"].sets if "vision" in sections else ():
        if one.sheet and (run / one.sheet).is_file():
            name = Path(one.sheet).relative_to(FOLDER).with_suffix("").as_posix()
            images[name] = (run / one.sheet).read_bytes()
            sheets[name] = is_private(one.sheet)
    markdown = _markdown(run, record, report, sheets)
    linked = [name for name, private in sheets.items() if private]
    return write_page(run / FOLDER, markdown, report.model_dump(mode="json"), images, linked)


def plots_of(
    laws: Mapping[str, Results], metrics: Mapping[str, Path], repeats: Mapping[str, str]
) -> dict[str, bytes]:
    """Return the PNGs of what there is: attention by layer and training curves, each by run."""
    from mmgraft.evaluation.report.plots import laws_plot, training_curves

    plots = {"laws": laws_plot(laws)} if laws else {}
    return plots | ({"curves": training_curves(metrics, repeats)} if metrics else {})


def _markdown(run: Path, record: GraftFile, report: RunReport, sheets: Mapping[str, bool]) -> str:
    recipe = run / RECIPE
    return render(
        "evaluation/report/run.md.jinja",
        about=about_run,
        tables=score_tables,
        report=report,
        record=record,
        own_base=record.base.id == f"./{OWN_BASE}",
        sheets=sheets,
        beside=BESIDE,
        losses=about_run.last_losses(run / METRICS),
        given=about_run.sets_given(record, list(report.sections.values())),
        recipe=without_folders(read_text(recipe)) if recipe.is_file() else None,
    )


def write_page(
    folder: Path,
    markdown: str,
    data: dict[str, Any],
    images: Mapping[str, bytes],
    linked: Collection[str] = (),
) -> dict[str, Path]:
    """Write a report as JSON, Markdown and HTML, with its images beside them.

    Args:
        folder: Where the files go; it is made.
        markdown: The report, which names images ``NAME.png``.
        data: What ``report.json`` holds.
        images: PNGs by name.
        linked: Names of images that the HTML page links to; it contains the others.

    Returns:
        The files by what they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: folder / f"{REPORT}.{name}" for name in ("json", "md", "html")}
    for name, png in images.items():
        written[name] = folder / f"{name}.png"
        atomic_bytes(written[name], png)
    inside = {f"{name}.png": png for name, png in images.items() if name not in linked}
    atomic_json(written["json"], data)
    atomic_text(written["md"], markdown)
    atomic_text(written["html"], render_html(markdown, inside))
    return written
