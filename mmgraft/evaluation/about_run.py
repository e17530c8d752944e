"""What a run is: the method, what it was trained on, and how it is made again. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from mmgraft.errors import UsageError
from mmgraft.evaluation.pages.page import Cell, Table, as_code, plain, row
from mmgraft.evaluation.pages.words import duration, megabytes
from mmgraft.evaluation.results import Results
from mmgraft.grafts.registry import get_method
from mmgraft.model.graft_file import OWN_BASE, GraftFile

_WINDOWS_PATH = re.compile(r"""(?<!\w)[A-Za-z]:\\+(?:[^\s\\'"`,;]+\\+)*([^\s\\'"`,;]+)""")
_WHOLE_PATH = re.compile(r"""(?<![\w.:/~-])~?/(?:[^\s/'"`,;]+/)+([^\s/'"`,;]+)""")

_IS_WHOLE_PATH = re.compile(r"(~?/[^/\n]+/|~/|[A-Za-z]:[\\/])[^\n]*\Z")


def shown_name(name: str | None) -> str:
    """A base's or tower's name as a report has it: folders of a machine are nobody's business."""
    if name is None:
        return "-"
    return PurePath(name).name if name.startswith(("/", "~", ".")) or "\\" in name else name


def without_folders(text: str) -> str:
    """A text in which every whole path of a machine is its last part alone; addresses stay."""
    return _WINDOWS_PATH.sub(r"\1", _WHOLE_PATH.sub(r"\1", text))


def settings_without_folders(value: Any) -> Any:
    """Settings in which every text that is a whole path of a machine is its last part alone."""
    if isinstance(value, dict):
        return {key: settings_without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [settings_without_folders(one) for one in value]
    if isinstance(value, str) and _IS_WHOLE_PATH.match(value):
        return PureWindowsPath(value).name  # which knows both kinds
    return value


def method_title(name: str) -> str:
    """`iaa: decoder layers inserted ... (arXiv ...)`; the name alone of one not installed."""
    try:
        method = get_method(name)
    except UsageError:
        return as_code(name)
    paper = f" ({method.paper})" if method.paper else ""
    return f"{as_code(name)}: {method.title}{paper}"


def method_settings(record: GraftFile) -> str:
    """The method's settings but for those that are not set, or that its structure lacks."""
    settings = {
        name: value
        for name, value in record.config.items()
        if name != "method" and value is not None
    }
    if settings.get("structure") == "c":
        settings.pop("gate", None)
    return "; ".join(f"{name}: {in_words(value)}" for name, value in settings.items()) or "-"


def in_words(value: Any) -> str:
    """A value of JSON or YAML in a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(in_words, value)) if isinstance(value, list) else str(value)


def data_rows(recipe: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Stage, file and remarks of all data that a recipe names; of a path its last part alone."""
    for stage in recipe.get("stages") or [{}]:
        for entry in stage.get("data") or recipe.get("data") or []:
            if not entry.get("path"):
                continue
            notes = []
            if entry.get("limit"):
                notes.append(f"first {entry['limit']} rows")
            if entry.get("weight", 1.0) != 1.0:
                notes.append(f"weight {entry['weight']:g}")
            yield stage.get("name", "-"), PurePath(entry["path"]).name, ", ".join(notes)


def facts_table(record: GraftFile, parameters: dict[str, int], training: Results | None) -> Table:
    """What was grafted on what, and how large it is."""
    base = shown_name(record.base.id)
    if record.base.revision:
        base += f" at {as_code(record.base.revision[:12])}"
    if record.base_trained or record.base.id == f"./{OWN_BASE}":
        base = "its own, in the run's folder"
        if record.trained_from is not None:
            base += f"; trained from {shown_name(record.trained_from.id)}"
    vision = shown_name(record.vision.name)
    if record.vision.feature_layer is not None:
        vision += f", hidden state {record.vision.feature_layer}"
    parts = ", ".join(f"{name} {size:,}" for name, size in parameters.items())
    rows = [
        row("method", method_title(record.method)),
        row("settings", plain(method_settings(record))),
        row("base", base),
        row("base trained", "yes: text may change" if record.base_trained else "no, it was frozen"),
        row("vision tower", vision),
        row("workflow", as_code(record.workflow)),
        row("parameters of the graft", f"{sum(parameters.values()):,} ({plain(parts)})"),
    ]
    if training is not None:
        rows += [row(name, text) for name, text in training_facts(training.details)]
    return Table("The graft", ["", ""], rows)


def training_facts(details: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a training cost, as far as it was measured."""
    if isinstance(details.get("trained_parameters"), int):
        yield "trained parameters", f"{details['trained_parameters']:,}"
    if isinstance(details.get("seconds"), int | float):
        yield "time of training", duration(details["seconds"])
    if isinstance(details.get("cpu_seconds"), int | float):
        yield "processor time", duration(details["cpu_seconds"])
    if isinstance(details.get("peak_memory_mb"), int | float):
        yield "peak memory", megabytes(details["peak_memory_mb"])


def stages_table(recipe: dict[str, Any]) -> Table | None:
    """What each stage trained, and on which rows; None of a graft that was never trained."""
    files: dict[str, list[str]] = {}
    for stage, file, note in data_rows(recipe):
        files.setdefault(stage, []).append(f"{file} ({note})" if note else file)
    rows = []
    for stage in recipe.get("stages") or []:
        trained = ", ".join(map(str, stage.get("train") or [])) or "-"
        steps = stage.get("max_steps")
        epochs = stage.get("epochs") or 1
        length = f"{steps:,} steps" if steps else f"{epochs:g} epoch{'s' * (epochs != 1)}"
        rate = stage.get("lr")
        rows.append(
            [
                Cell(plain(stage.get("name", "-"))),
                Cell(plain(trained)),
                Cell(plain(", ".join(files.get(stage.get("name", "-"), [])) or "-")),
                Cell(length),
                Cell(plain(in_words(stage.get("batch_size") or "-"))),
                Cell(f"{rate:g}" if isinstance(rate, int | float) else plain(rate or "-")),
            ]
        )
    columns = ["stage", "trained", "rows from", "length", "batch", "learning rate"]
    return Table("What each stage trained, and on what", columns, rows) if rows else None


def versions_table(sections: Sequence[Results]) -> Table:
    """Software that measured, one column where all sections agree."""
    found: dict[str, list[str]] = {}
    for section in sections:
        for name, version in {"mmgraft": section.mmgraft_version, **section.versions}.items():
            versions = found.setdefault(name, [])
            if version not in versions:
                versions.append(version)
    rows = [row(plain(name), plain(", ".join(versions))) for name, versions in found.items()]
    return Table("Software", ["package", "version"], rows, folded=True)


def commands(run: Path, record: GraftFile, sections: Sequence[Results]) -> list[str]:
    """Commands that make and measure the run again, beside its `recipe.yaml`."""
    name = run.resolve().name
    start = record.trained_from or record.base
    lines = []
    if not start.id.startswith("./"):
        lines.append(
            f"mmgraft graft {shown_name(start.id)} --vision {shown_name(record.vision.name)} "
            f"--recipe recipe.yaml --out {name}"
        )
    if record.recipe is not None:
        lines.append(f"mmgraft train {name}{_given_data(run, record.recipe)}")
    measured = [one.section for one in sections]
    flags = [f"--{section}" for section in ("text", "vision", "iit") if section in measured]
    if flags:
        lines.append(f"mmgraft eval {name} {' '.join(flags)}")
    if "laws" in measured:
        lines.append(f"mmgraft laws {name}")
    return lines


def sets_given(record: GraftFile, sections: Sequence[Results]) -> list[str]:
    """Sets of text and vision that were asked and that the recipe does not name."""
    named = {one.get("name") for one in (record.recipe or {}).get("evaluation") or []}
    return [
        plain(one.name)
        for section in sections
        if section.section in ("text", "vision")
        for one in section.sets
        if one.name not in named
    ]


def _given_data(run: Path, recipe: dict[str, Any]) -> str:
    """Options for data that the run's recipe leaves open, and a command had filled in."""
    file = run / "recipe.yaml"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    given = {stage: name for stage, name, _ in data_rows(recipe) if name not in text}
    return "".join(f" --data {stage}={name}" for stage, name in given.items())
