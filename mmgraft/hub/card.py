"""The model card: what a graft is, what it was made of, what it keeps, what it scores."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmgraft.evaluation.report import about_run, score_tables
from mmgraft.evaluation.report.markdown import render
from mmgraft.evaluation.report.words import in_words, interval, score_name
from mmgraft.hub.references import is_repo_id
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.summary import graft_parts, limits
from mmgraft.runs.contents import README, RECIPE
from mmgraft.runs.results import FOLDER, Results, Section, SetResult
from mmgraft.runs.results import measured as results_of
from mmgraft.textfiles import read_text

MARKER = "<!-- mmgraft: `push` rewrites this card; delete this line to keep what you write -->"

_MARKED = re.compile(r"^<!-- mmgraft:", re.MULTILINE)

_IMAGES = (
    ("contact_sheet.png", "Test images with the question and the model's answer"),
    ("laws.png", "Attention weights of each layer before, on and after the image"),
    ("curves.png", "Training loss by step"),
)
_REPORTS = ("report.md", "report.html", "report.json")
_SCORED: tuple[Section, ...] = ("text", "vision", "iit")
_QUESTIONS = "visual-question-answering"
_TASKS = {"caption": "image-to-text", "box": "image-text-to-text"}


def is_ours(text: str) -> bool:
    """Return whether a README is a card of :func:`render_card` that its owner left to us."""
    return _MARKED.search(text) is not None


def has_own_readme(run: Path) -> bool:
    """Tell whether a run's README is written by its owner, and so kept as it is."""
    readme = run / README
    return readme.is_file() and not is_ours(readme.read_text(encoding="utf-8", errors="replace"))


def card_of(
    run: Path, record: GraftFile, name: str, files: Collection[str], license: str | None = None
) -> str:
    """Return the card of a run: its recipe, parameters and results; see ``render_card``."""
    recipe = run / RECIPE
    text = read_text(recipe) if recipe.is_file() else None
    sizes = {row.part: row.parameters for row in graft_parts(run, record.method)}
    return render_card(record, name, sizes, text, license, results_of(run), files)


def render_card(
    record: GraftFile,
    repo_id: str,
    parameters: dict[str, int],
    recipe: str | None = None,
    license: str | None = None,
    measured: Sequence[Results] = (),
    files_there: Collection[str] = (),
) -> str:
    """Return the card as Markdown with its YAML front matter.

    Args:
        record: What ``graft_config.json`` of the repository says.
        repo_id: The repository it is pushed to.
        parameters: Numbers in each part of the graft.
        recipe: Text of ``recipe.yaml``; its absolute paths are shortened to their last part.
        license: Identifier such as ``apache-2.0``, where the owner gave one.
        measured: Sections of ``results/``; they become tables, and metadata of the Hub.
        files_there: Names of the repository's other files; images and reports among them are
            shown and linked.
    """
    if recipe is None and record.recipe is not None:
        recipe = yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True, width=100)
    front_matter = _front_matter(record, repo_id, license, measured)
    sections = {one.section: one for one in measured if one.section in _SCORED}
    text = render(
        "hub/card.md.jinja",
        about=about_run,
        tables=score_tables,
        front_matter=yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True),
        marker=MARKER,
        repo_id=repo_id,
        record=record,
        limits=limits(record),
        parameters=parameters,
        data=list(about_run.data_rows(record.recipe or {})),
        recipe=about_run.without_folders(recipe) if recipe else None,
        results=list(_flat(record.results or {})),
        sections={name: one for name, one in sections.items() if one.sets or one.identity},
        images=[one for one in _IMAGES if f"{FOLDER}/{one[0]}" in files_there],
        reports=[one for one in _REPORTS if f"{FOLDER}/{one}" in files_there],
    )
    return text.rstrip() + "\n"


def _front_matter(
    record: GraftFile, repo_id: str, license: str | None, measured: Sequence[Results]
) -> dict[str, Any]:
    data: dict[str, Any] = {"library_name": "mmgraft", "pipeline_tag": "image-text-to-text"}
    if license is not None:
        data["license"] = license
    if is_repo_id(record.base.id):
        data["base_model"] = record.base.id
        data["base_model_relation"] = "adapter"
    data["tags"] = ["mmgraft", record.method, "vision-language", "multimodal"]
    sets = [(one, of.section) for of in measured if of.section in _SCORED for one in of.sets]
    results = [found for one, section in sets if (found := _model_index(one, section))["metrics"]]
    if results:
        data["model-index"] = [{"name": repo_id.rpartition("/")[2], "results": results}]
    return data


def _model_index(one: SetResult, section: str) -> dict[str, Any]:
    """Return the scores of a set as the Hub's metadata ``model-index`` has them."""
    metrics = [
        {
            "type": name,
            "value": round(score.value, 6),
            "name": f"{score_name(name)}, {score.count:,} items (95 % interval {interval(score)})",
        }
        for name, score in one.scores.items()
        if math.isfinite(score.value)
    ]
    tasks = {"text": "text-generation", "iit": "image-text-to-text"}
    return {
        "task": {"type": tasks.get(section) or _TASKS.get(one.metric, _QUESTIONS)},
        "dataset": {
            "name": one.name,
            "type": re.sub(r"[^a-z0-9]+", "-", one.name.lower()).strip("-"),
        },
        "metrics": metrics,
    }


def _flat(results: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in results.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}, ")
        elif not isinstance(value, list):
            yield name, in_words(value)
