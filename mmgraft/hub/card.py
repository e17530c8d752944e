"""The model card: what a graft is, what it was made of, what it keeps, what it scores."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from importlib.resources import files
from typing import Any

import yaml

from mmgraft.evaluation.about_run import data_rows, in_words, method_title, without_folders
from mmgraft.evaluation.pages.markdown import block_lines, fenced
from mmgraft.evaluation.pages.page import Block, Paragraph
from mmgraft.evaluation.results import FOLDER, Results
from mmgraft.evaluation.score_tables import (
    grid_table,
    identity_sentence,
    kinds_tables,
    text_table,
    vision_table,
)
from mmgraft.hub.model_index import model_index
from mmgraft.model.graft_file import GraftFile

MARKER = "<!-- mmgraft: `push` rewrites this card; delete this line to keep what you write -->"

_MARKED = re.compile(r"^<!-- mmgraft:", re.MULTILINE)

_FROZEN = """\
The base was frozen. A batch of prompts without an image runs the base alone and gives its logits
bit for bit; `with model.text_only():` asks for that explicitly."""

_TRAINED = """\
**Text may change.** The base was trained together with the graft, so text answers are those of
this trained base, not of the original language model."""

_OFFICIAL = """\
This is the `official` variant of Wings: it computes what the published code computes, and exists
to load published checkpoints. None of mmgraft's guarantees holds for its image rows: text after
a position can change what the position sees, a row can depend on how its batch is padded (use
single prompts or right padding), there is exactly one image of a fixed number of tokens, decoding
recomputes everything for every token, and it cannot be trained further."""


_PICTURES = (
    ("contact_sheet.png", "Test pictures with what was asked and what the model answered"),
    ("laws.png", "Attention weights of each layer before, on and after the image"),
    ("curves.png", "Training loss by step"),
)
_REPORTS = ("report.md", "report.html", "report.json")


def is_ours(text: str) -> bool:
    """Whether a README is a card that :func:`render_card` wrote and nobody took over."""
    return _MARKED.search(text) is not None


def render_card(
    record: GraftFile,
    repo_id: str,
    parameters: dict[str, int],
    recipe: str | None = None,
    license: str | None = None,
    measured: Sequence[Results] = (),
    files_there: Collection[str] = (),
) -> str:
    """The card as Markdown with its YAML front matter.

    Args:
        record: what ``graft_config.json`` of the repository says.
        repo_id: where it is pushed to.
        parameters: numbers in each part of the graft.
        recipe: text of ``recipe.yaml``; of whole paths in it the last part is shown.
        license: identifier such as ``apache-2.0``, where the owner gave one.
        measured: the sections of ``results/``; they become tables, and metadata of the Hub.
        files_there: names of the repository's other files; pictures and reports among them are
            shown and linked.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    template = environment.from_string(
        files("mmgraft.hub").joinpath("card.md.jinja").read_text(encoding="utf-8")
    )
    own_base = record.base.id if record.base.id.startswith("./") else None
    if recipe is None and record.recipe is not None:
        recipe = yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True, width=100)
    return template.render(
        front_matter=yaml.safe_dump(
            _front_matter(record, repo_id, license, measured), sort_keys=False, allow_unicode=True
        ),
        marker=MARKER,
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        base=f"`{own_base}`" if own_base else _link(record.base.id),
        own_base=own_base,
        facts=[(name, _cell(value)) for name, value in _facts(record)],
        kept=_kept(record),
        parameters=list(parameters.items()),
        total=sum(parameters.values()),
        trained=record.recipe is not None,
        data=[tuple(map(_cell, row)) for row in data_rows(record.recipe or {})],
        recipe="\n".join(fenced(without_folders(recipe), "yaml")) if recipe else None,
        results=[(_cell(name), _cell(value)) for name, value in _flat(record.results or {})],
        measured=_measured(measured),
        pictures=[one for one in _PICTURES if f"{FOLDER}/{one[0]}" in files_there],
        reports=[one for one in _REPORTS if f"{FOLDER}/{one}" in files_there],
    )


def _front_matter(
    record: GraftFile, repo_id: str, license: str | None, measured: Sequence[Results]
) -> dict[str, Any]:
    data: dict[str, Any] = {"library_name": "mmgraft", "pipeline_tag": "image-text-to-text"}
    if license is not None:
        data["license"] = license
    if not record.base.id.startswith("./"):
        data["base_model"] = record.base.id
        data["base_model_relation"] = "adapter"
    data["tags"] = ["mmgraft", record.method, "vision-language", "multimodal"]
    index = model_index(repo_id.rpartition("/")[2], measured)
    if index:
        data["model-index"] = index
    return data


def _facts(record: GraftFile) -> Iterator[tuple[str, str]]:
    yield "base", _with_revision(record.base.id, record.base.revision)
    yield "method", method_title(record.method)
    if "layers" in record.config:
        layers = record.config["layers"]
        yield "layers", layers if isinstance(layers, str) else ", ".join(map(str, layers))
    settings = {
        key: value
        for key, value in record.config.items()
        if key not in ("method", "layers") and value is not None
    }
    if settings.get("structure") == "c":
        settings.pop("gate", None)  # it has none
    yield (
        "settings",
        ", ".join(f"{key}: {in_words(value)}" for key, value in settings.items()) or "-",
    )
    vision = record.vision
    tower = _with_revision(vision.id, vision.revision) if vision.id else f"`{vision.kind}`"
    if vision.feature_layer is not None:
        tower += f", hidden state {vision.feature_layer}"
    yield "vision tower", tower
    yield "workflow", f"`{record.workflow}`"
    yield "prompt template", record.template.kind
    yield "written by", f"mmgraft {record.mmgraft_version}"


def _kept(record: GraftFile) -> str:
    told = [_TRAINED if record.base_trained else _FROZEN]
    if record.method == "wings" and record.config.get("variant") == "official":
        told.append(_OFFICIAL)
    return "\n\n".join(told)


def _measured(sections: Sequence[Results]) -> list[tuple[str, str]]:
    """Headings and Markdown of the sections that have scores for a reader of the card."""
    titles = {"text": "Text", "vision": "Vision", "iit": "Interleaved dialogues"}
    shown = []
    for section in sections:
        blocks: list[Block] = []
        if section.identity is not None:
            blocks.append(Paragraph(identity_sentence(section.identity)))
        if section.section == "text" and section.sets:
            blocks.append(text_table(section.sets))
        elif section.section == "vision" and section.sets:
            blocks += [vision_table(section.sets), *kinds_tables(section.sets)]
        elif section.section == "iit" and section.sets:
            blocks.append(grid_table("The last question of each shape", section.sets, "shape"))
        if blocks:
            text = "\n\n".join("\n".join(block_lines(block)) for block in blocks)
            shown.append((titles[section.section], text))
    return shown


def _flat(results: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in results.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}, ")
        elif not isinstance(value, list):
            yield name, in_words(value)


def _with_revision(name: str, revision: str | None) -> str:
    if name.startswith("./"):
        return f"`{name}` in this repository"
    return f"{_link(name)} at `{revision}`" if revision else _link(name)


def _link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})"


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")
