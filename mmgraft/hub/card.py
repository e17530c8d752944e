"""The model card: what a graft is, what it was made of, what it keeps, what it scores."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import yaml

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


def is_ours(text: str) -> bool:
    """Whether a README is a card that :func:`render_card` wrote and nobody took over."""
    return _MARKED.search(text) is not None


def render_card(
    record: GraftFile,
    repo_id: str,
    parameters: dict[str, int],
    recipe: str | None = None,
    license: str | None = None,
) -> str:
    """The card as Markdown with its YAML front matter.

    Args:
        record: what ``graft_config.json`` of the repository says.
        repo_id: where it is pushed to.
        parameters: numbers in each part of the graft.
        recipe: text of ``recipe.yaml``; shown as it is.
        license: identifier such as ``apache-2.0``, where the owner gave one.
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
            _front_matter(record, license), sort_keys=False, allow_unicode=True
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
        data=[tuple(map(_cell, row)) for row in _data(record.recipe or {})],
        recipe=recipe.rstrip("\n") if recipe else None,
        fence=_fence(recipe or ""),
        results=[(_cell(name), _cell(value)) for name, value in _flat(record.results or {})],
    )


def _front_matter(record: GraftFile, license: str | None) -> dict[str, Any]:
    data: dict[str, Any] = {"library_name": "mmgraft", "pipeline_tag": "image-text-to-text"}
    if license is not None:
        data["license"] = license
    if not record.base.id.startswith("./"):
        data["base_model"] = record.base.id
        data["base_model_relation"] = "adapter"
    data["tags"] = ["mmgraft", record.method, "vision-language", "multimodal"]
    return data


def _facts(record: GraftFile) -> Iterator[tuple[str, str]]:
    yield "base", _with_revision(record.base.id, record.base.revision)
    yield "method", _method(record)
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
    yield "settings", ", ".join(f"{key}: {_plain(value)}" for key, value in settings.items()) or "-"
    vision = record.vision
    tower = _with_revision(vision.id, vision.revision) if vision.id else f"`{vision.kind}`"
    if vision.feature_layer is not None:
        tower += f", hidden state {vision.feature_layer}"
    yield "vision tower", tower
    yield "workflow", f"`{record.workflow}`"
    yield "prompt template", record.template.kind
    yield "written by", f"mmgraft {record.mmgraft_version}"


def _method(record: GraftFile) -> str:
    from mmgraft.errors import UsageError
    from mmgraft.grafts.registry import get_method

    try:
        method = get_method(record.method)
    except UsageError:
        return f"`{record.method}`"
    paper = f" ({method.paper})" if method.paper else ""
    return f"`{record.method}`: {method.title}{paper}"


def _kept(record: GraftFile) -> str:
    told = [_TRAINED if record.base_trained else _FROZEN]
    if record.method == "wings" and record.config.get("variant") == "official":
        told.append(_OFFICIAL)
    return "\n\n".join(told)


def _data(recipe: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    stages = recipe.get("stages") or [{}]
    for stage in stages:
        for entry in stage.get("data") or recipe.get("data") or []:
            if not entry.get("path"):
                continue
            notes = []
            if entry.get("limit"):
                notes.append(f"first {entry['limit']} rows")
            if entry.get("weight", 1.0) != 1.0:
                notes.append(f"weight {entry['weight']:g}")
            # The last part only: the folders above it are nobody's business.
            yield stage.get("name", "-"), PurePath(entry["path"]).name, ", ".join(notes)


def _flat(results: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in results.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}, ")
        elif not isinstance(value, list):
            yield name, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _with_revision(name: str, revision: str | None) -> str:
    if name.startswith("./"):
        return f"`{name}` in this repository"
    return f"{_link(name)} at `{revision}`" if revision else _link(name)


def _link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})"


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")


def _fence(text: str) -> str:
    """A fence longer than any run of backticks inside."""
    return "`" * max([2, *map(len, re.findall(r"`+", text))]) + "`"
