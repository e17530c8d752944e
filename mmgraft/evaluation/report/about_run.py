"""Description of a run: the method, its training data, and how to make it again. Free of torch."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from mmgraft.errors import UsageError
from mmgraft.evaluation.report.markdown import as_code, plain
from mmgraft.evaluation.report.words import in_words
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.runs.results import Results

METRICS = "metrics.jsonl"

_WINDOWS_PATH = re.compile(r"""(?<!\w)[A-Za-z]:\\+(?:[^\s\\'"`,;]+\\+)*([^\s\\'"`,;]+)""")
_WHOLE_PATH = re.compile(r"""(?<![\w.:/~-])~?/(?:[^\s/'"`,;]+/)+([^\s/'"`,;]+)""")
_IS_WHOLE_PATH = re.compile(r"(~?/[^/\n]+/|~/|[A-Za-z]:[\\/])[^\n]*\Z")


def shown_name(name: str | None) -> str:
    """Return the name of a base or tower as a report shows it: of a folder the last part alone."""
    if name is None:
        return "-"
    return PurePath(name).name if name.startswith(("/", "~", ".")) or "\\" in name else name


def without_folders(text: str) -> str:
    """Shorten every absolute path in a text to its last part; web addresses stay."""
    return _WINDOWS_PATH.sub(r"\1", _WHOLE_PATH.sub(r"\1", text))


def settings_without_folders(value: Any) -> Any:
    """Shorten every string in settings that is an absolute path to its last part."""
    if isinstance(value, dict):
        return {key: settings_without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [settings_without_folders(one) for one in value]
    if isinstance(value, str) and _IS_WHOLE_PATH.match(value):
        return PureWindowsPath(value).name  # it splits at both kinds of slash
    return value


def method_title(name: str) -> str:
    """Return a method's name, title and paper; the name alone where it is not installed."""
    try:
        method = get_method(name)
    except UsageError:
        return as_code(name)
    paper = f" ({method.paper})" if method.paper else ""
    return f"{as_code(name)}: {method.title}{paper}"


def method_settings(record: GraftFile) -> str:
    """Return the method's settings, without those that are not set or do nothing."""
    settings = {name: value for name, value in record.config.items() if value is not None}
    settings.pop("method", None)
    with suppress(UsageError):  # a method that is not installed
        for name in get_method(record.method).unused(record.settings):
            settings.pop(name, None)
    return plain(in_words(settings)) or "-"


def data_rows(recipe: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield stage, file name and remarks of every data file that a recipe names."""
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


def versions(sections: Iterable[Results]) -> dict[str, str]:
    """Return the versions of the software that measured, all of them where sections differ."""
    found: dict[str, dict[str, None]] = {}  # in order, each version once
    for section in sections:
        for name, version in {"mmgraft": section.mmgraft_version, **section.versions}.items():
            found.setdefault(name, {})[version] = None
    return {name: ", ".join(several) for name, several in found.items()}


def commands(run: Path, record: GraftFile, sections: Sequence[Results]) -> list[str]:
    """Return the commands that make and measure a run again, beside its ``recipe.yaml``."""
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


def _given_data(run: Path, recipe: dict[str, Any]) -> str:
    """Return the options for data that ``recipe.yaml`` leaves open and a command filled in."""
    file = run / "recipe.yaml"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    given = {stage: name for stage, name, _ in data_rows(recipe) if name not in text}
    return "".join(f" --data {stage}={name}" for stage, name in given.items())


def sets_given(record: GraftFile, sections: Sequence[Results]) -> list[str]:
    """Return the evaluated sets of text and vision that the recipe does not name."""
    named = {one.get("name") for one in (record.recipe or {}).get("evaluation") or []}
    return [
        one.name
        for section in sections
        if section.section in ("text", "vision")
        for one in section.sets
        if one.name not in named
    ]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a ``metrics.jsonl``, without lines that a kill cut short; none where it is missing."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def last_losses(path: Path) -> dict[str, float]:
    """Return the last logged loss of each stage of a ``metrics.jsonl``."""
    return {
        str(line.get("stage", "-")): float(line["loss"])
        for line in read_metrics(path)
        if isinstance(line.get("loss"), int | float)
    }
