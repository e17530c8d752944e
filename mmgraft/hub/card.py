"""The model card: what a graft is, what it was made of, what it keeps, what it scores.

Its references to base and tower are made ones that anybody else can follow.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmgraft.errors import UsageError
from mmgraft.evaluation.report import about_run, markdown, score_tables, words
from mmgraft.frozen import Frozen
from mmgraft.model.files.graft_file import BaseReference, GraftFile
from mmgraft.model.files.summary import graft_parts, limits
from mmgraft.runs.contents import README, RECIPE
from mmgraft.runs.results import FOLDER, Results, Section, SetResult
from mmgraft.runs.results import measured as results_of
from mmgraft.textfiles import read_text
from mmgraft.vision.spec import TRANSFORMERS_KIND, VisionSpec

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WHAT = {"base": "base", "vision": "vision tower"}


class Portable(Frozen):
    """A graft's record as others can use it.

    Attributes:
        record: With references that are Hub ids or folders beside the record.
        folders: The folders inside the run that it names; they are pushed too.
    """

    record: GraftFile
    folders: list[str]


def make_portable(
    record: GraftFile, run: Path, base_id: str | None = None, vision_id: str | None = None
) -> Portable:
    """Replace references that only this machine understands.

    Args:
        record: What ``graft_config.json`` says.
        run: Its folder.
        base_id: The Hub id under which the base was pushed, instead of the one recorded.
        vision_id: The same for the vision tower.

    Raises:
        UsageError: For a base or tower that is a folder outside the run, and for an id that is
            not of the form ``owner/name``.
    """
    update: dict[str, Any] = {}
    if base_id is not None:
        _check_id(base_id, "--base-id")
        update["base"] = BaseReference(id=base_id, fingerprint=record.base.fingerprint)
    if vision_id is not None:
        _check_id(vision_id, "--vision-id")
        update["vision"] = record.vision.model_copy(update={"id": vision_id, "revision": None})
    folders: list[str] = []
    for key, reference, folder in local_references(record, run):
        if key not in update:
            inside = _inside(folder, run, WHAT[key], f"--{key}-id")
            update[key] = reference.model_copy(update={"id": f"./{inside}"})
            folders.append(inside)
    original = record.trained_from
    if original is not None and local_folder(original.id, original.revision, run) is not None:
        update["trained_from"] = None  # a folder of this machine, which only evaluation reads
    return Portable(record.model_copy(update=update), folders)


def local_references(
    record: GraftFile, run: Path
) -> Iterator[tuple[str, BaseReference | VisionSpec, Path]]:
    """Yield ``base`` and ``vision``, where they are folders of this machine, with those folders."""
    for key, reference in _references(record):
        folder = local_folder(str(reference.id), reference.revision, run)
        if folder is not None:
            yield key, reference, folder


def _references(record: GraftFile) -> Iterator[tuple[str, BaseReference | VisionSpec]]:
    """Yield base and tower by their keys in the record; not a tower that a package holds."""
    yield "base", record.base
    if record.vision.id is not None and record.vision.kind == TRANSFORMERS_KIND:
        yield "vision", record.vision


def local_folder(name: str, revision: str | None, run: Path) -> Path | None:
    """Return the folder that ``name`` means on this machine, or None where it is a Hub id.

    A name that could be both is a Hub id when a revision was recorded with it.
    """
    path = Path(name).expanduser()
    candidates = [path] if path.is_absolute() else [run / path, path]
    found = next((one for one in candidates if one.is_dir()), None)
    if name.startswith((".", "~")) or path.is_absolute() or name.count("/") > 1:
        return found or candidates[0]
    return found if revision is None else None


def confirm_references(
    record: GraftFile, api: "HfApi", named: Collection[str] = ()
) -> tuple[GraftFile, list[str]]:
    """Ask the Hub for base and tower, and pin those that have no commit yet.

    Args:
        record: A portable record.
        api: The Hub.
        named: Ids that the user gave for this push.

    Returns:
        The record, and a sentence for each reference that others will not get.

    Raises:
        UsageError: For an id in ``named`` that the Hub does not give out.
    """
    warnings: list[str] = []
    update: dict[str, Any] = {}
    for key, reference in _references(record):
        name, what = str(reference.id), WHAT[key]
        if name.startswith("./"):
            continue
        info = _info(name, reference.revision, api)
        if info is None and name in named:
            raise UsageError(
                f"the Hub does not give out {name} as the {what}; push it first, or check the name"
            )
        if info is None:
            at = f"{name} at {reference.revision}" if reference.revision else name
            warnings.append(
                f"the Hub does not give out the {what} {at}; without it nobody can load the graft"
            )
            continue
        if info.private:
            warnings.append(f"the {what} {name} is private; who cannot read it cannot load this")
        if reference.revision is None:
            update[key] = reference.model_copy(update={"revision": info.sha})
    return record.model_copy(update=update), warnings


def _info(name: str, revision: str | None, api: "HfApi") -> Any:
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return api.model_info(name, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _inside(folder: Path, run: Path, what: str, option: str) -> str:
    try:
        inside = folder.resolve().relative_to(run.resolve()).as_posix()
    except ValueError:
        inside = "."
    if inside == ".":
        raise UsageError(
            f"the {what} of this graft is the folder {folder}, which nobody else has, so nobody "
            f"else could load the graft. Push that folder first (hf upload YOU/NAME {folder}) and "
            f"give {option} YOU/NAME"
        )
    return inside


def is_repo_id(name: str) -> bool:
    """Tell whether a repository of the Hub can be called so."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _check_id(name: str, option: str) -> None:
    if name.count("/") != 1 or not is_repo_id(name):
        raise UsageError(f"{option} {name} is no Hub id: write OWNER/NAME")


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
    text = markdown.render(
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
            "name": f"{words.score_name(name)}, {score.count:,} items "
            f"(95 % interval {words.interval(score)})",
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
            yield name, words.in_words(value)
