"""The small adapter in a folder of its own: what ``mmgraft push`` would send."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmgraft.atomic import atomic_folder, atomic_text
from mmgraft.export.folder import Exported, copy_file, sizes_in
from mmgraft.hub.card import card_of, has_own_readme
from mmgraft.hub.references import WHAT, local_references
from mmgraft.model.files.graft_file import CONFIG_NAME, GraftFile
from mmgraft.progress import counted, say
from mmgraft.runs.contents import README, UploadFile, belonging


def export_graft(run: Path, out: Path, dry_run: bool = False) -> Exported:
    """Write config, weights, recipe, results and card of a graft into a new folder.

    A base or tower that lies inside the run goes along; one that lies elsewhere on this machine is
    named by its whole path.

    Args:
        run: The graft's folder.
        out: See :func:`mmgraft.export.folder.check_folder`.
        dry_run: List the files and write nothing.

    Raises:
        UsageError: A damaged graft.
        MMGraftError: The disk is full; what stood in ``out`` is whole.
    """
    record, inside, notes = _settled(GraftFile.read(run), run)
    files = belonging(run, inside)
    if dry_run:
        listed = {CONFIG_NAME: len(record.dump().encode())} | {f.name: f.size for f in files}
        return Exported("graft", out, record.workflow, listed, notes, written=False)

    def write(folder: Path) -> None:
        say(f"copying {len(files)} files")
        write_files(folder, files)
        write_record(folder, run, record, out.name, [file.name for file in files])

    atomic_folder(out, write)
    return Exported("graft", out, record.workflow, sizes_in(out), notes)


def write_files(folder: Path, files: list[UploadFile]) -> None:
    """Copy what belongs to a graft beside its record."""
    for file in counted("copying the graft, files", files):
        assert isinstance(file.content, Path)
        copy_file(file.content, folder / file.name)


def write_record(
    folder: Path, run: Path, record: GraftFile, name: str, files: Sequence[str] = ()
) -> None:
    """Write ``graft_config.json`` and the card; a README of the user's own is kept."""
    atomic_text(folder / CONFIG_NAME, record.dump())
    if has_own_readme(run):
        copy_file(run / README, folder / README)
    else:
        atomic_text(folder / README, card_of(run, record, name, files))


def _settled(record: GraftFile, run: Path) -> tuple[GraftFile, list[str], list[str]]:
    """Return the record with references that hold anywhere, folders that go along, and notes."""
    inside: list[str] = []
    notes: list[str] = []
    update: dict[str, Any] = {}
    for key, reference, folder in local_references(record, run):
        name = _portable(folder, run, inside, notes, WHAT[key])
        update[key] = reference.model_copy(update={"id": name})
    return record.model_copy(update=update), inside, notes


def _portable(folder: Path, run: Path, inside: list[str], notes: list[str], what: str) -> str:
    folder, run = folder.resolve(), run.resolve()
    if folder != run and folder.is_relative_to(run):
        name = folder.relative_to(run).as_posix()
        inside.append(name)
        notes.append(f"the {what} goes along in ./{name}: it lies in the graft's own folder")
        return f"./{name}"
    notes.append(f"the {what} is not in it, but referred to: the folder {folder} of this machine")
    return str(folder)
