"""The folder that an export writes, and the result that the command shows."""

import json
import shutil
from dataclasses import field
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.model.files.graft_file import CONFIG_NAME, GraftFile

Kind = Literal["graft", "full", "llava", "peft", "gguf", "mmproj", "vllm"]

#: Key of an exported ``config.json`` that says what the model was made of.
NOTE_KEY = "mmgraft"

ADAPTER = "adapter_model.safetensors"
MMPROJ = "mmproj.gguf"

_OF_A_RUN = ("checkpoints", "metrics.jsonl")


class Exported(Frozen):
    """Result of an export, or of a dry run.

    Attributes:
        kind: Kind of export.
        folder: Its folder.
        workflow: The one workflow in it.
        files: Names and sizes in bytes; of a dry run only large files.
        notes: Sentences that the user must know about the result.
        difference: Largest difference between the logits of the stock model and the graft's.
        written: False for a dry run.
    """

    kind: Kind
    folder: Path
    workflow: str
    files: dict[str, int]
    notes: list[str] = field(default_factory=list)
    difference: float | None = None
    written: bool = True


def default_folder(run: Path, kind: Kind) -> Path:
    """Return the folder of an export when the user names none, below the current folder."""
    return Path(f"{run.resolve().name}-{kind}")


def find_workflow(run: Path, name: str | None) -> Path:
    """Return the folder of the graft with this workflow: the run itself, or a graft right below it.

    Raises:
        UsageError: None of them is called so.
    """
    record = GraftFile.read(run)
    if name is None or record.workflow == name:
        return run
    others = sorted(path.parent for path in run.glob(f"*/{CONFIG_NAME}"))
    found = {GraftFile.read(folder).workflow: folder for folder in others}
    if name in found:
        return found[name]
    raise UsageError(
        f"{run} has no workflow {name!r}; give --workflow one of: "
        f"{', '.join([record.workflow, *found])}."
    )


def check_folder(out: Path, run: Path, force: bool) -> Path:
    """Return the absolute path of an output folder that may be written.

    Raises:
        UsageError: It is in use: not empty without ``force``, or holding something else than an
            earlier export, which ``force`` would destroy.
    """
    out = out.expanduser().resolve()
    for used, what in ((run.resolve(), "the graft"), (Path.cwd(), "the current folder")):
        if out == used or out in used.parents:
            raise UsageError(f"{out} is or contains {what}; name another folder with --out.")
    if not out.exists():
        return out
    if not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder with --out.")
    if not any(out.iterdir()):
        return out
    if not force:
        raise UsageError(
            f"{out} is not empty; name another folder with --out, or replace the export in it "
            "with --force."
        )
    if not _is_export(out):
        raise UsageError(
            f"{out} holds something else than an earlier export, and --force would delete it; "
            "name another folder with --out."
        )
    return out


def _is_export(folder: Path) -> bool:
    if (folder / CONFIG_NAME).is_file():
        return not any((folder / name).exists() for name in _OF_A_RUN)
    try:
        if (folder / MMPROJ).is_file():
            with (folder / MMPROJ).open("rb") as file:  # its first keys
                return NOTE_KEY.encode() in file.read(256)
        if (folder / ADAPTER).is_file():
            with safe_open(folder / ADAPTER, framework="pt") as file:
                return NOTE_KEY in (file.metadata() or {})
        return NOTE_KEY in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError):
        return False


def sizes_in(folder: Path) -> dict[str, int]:
    """Return every file below a folder with its size, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def copy_file(source: Path, target: Path) -> None:
    """Make a copy of its own, also where the source is a link into a cache."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
