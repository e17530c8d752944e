"""References of a graft to its base and tower that anybody else can follow."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.errors import UsageError
from mmgraft.model.files.graft_file import BaseReference, GraftFile
from mmgraft.vision.spec import TRANSFORMERS_KIND, VisionSpec

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WHAT = {"base": "base", "vision": "vision tower"}


@dataclass(frozen=True)
class Portable:
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
    record: GraftFile, api: HfApi, named: Collection[str] = ()
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


def _info(name: str, revision: str | None, api: HfApi) -> Any:
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
