"""Checkpoints of a stage: what is trained and what is needed to go on exactly, never the base."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerState

from mmgraft.atomic import atomic_folder, atomic_json
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.model.sharded import gathered, like
from mmgraft.textfiles import read_json
from mmgraft.training.distributed.parallel import way_on
from mmgraft.training.distributed.sharding import rest

FOLDER = "checkpoints"
TENSORS = "trained.safetensors"
PROGRESS = "progress.json"
ROWS = "rows.json"
_NAME = re.compile(r"checkpoint-\d+")
#: Text of the RuntimeError of torch's file writer where a disk is full.
_OF_DISK = ("PytorchStreamWriter", "inline_container", "iostream error")


def stage_folder(run: Path, index: int, name: str) -> Path:
    """Return where the checkpoints of a stage lie, stages counted from 1."""
    return run / FOLDER / f"{index + 1}-{name}"


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a stage, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in found if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def trained_tensors(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """Collect the parameters that are trained, by name; those that share one tensor once.

    Where the model is in pieces over processes, all of them must call this together.

    Args:
        model: Any.
        keep: False, for a process that only helps to gather, gives an empty dict.
    """
    rest(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {name: tensor.contiguous() for name, tensor in gathered(trained, keep).items()}


def write_checkpoint(target: Path, write: Callable[[Path], None]) -> None:
    """Write a checkpoint folder so that it is whole or not there.

    Args:
        target: The folder, ``.../checkpoint-100``.
        write: Puts the files into the folder that it is given.

    Raises:
        MMGraftError: The disk is full or fails; earlier checkpoints are whole.
    """
    try:
        atomic_folder(target, write)
    except (MMGraftError, RuntimeError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, RuntimeError) and not any(sign in str(cause) for sign in _OF_DISK):
            raise
        raise MMGraftError(_unwritten(target, cause)) from cause


def _unwritten(target: Path, error: BaseException) -> str:
    earlier = [path for path in checkpoints(target.parent) if path != target]
    whole = f"the one before, {earlier[-1].name}, is whole" if earlier else "there is none before"
    run = target.parent.parent.parent
    return (
        f"the checkpoint {target} could not be written ({error}); {whole}. Make room and go on "
        f"with: {way_on(run)}"
    )


def sweep(folder: Path) -> None:
    """Remove what killed saves of a stage left behind; a checkpoint put aside comes back."""
    if folder.is_dir():
        for old in folder.glob(".checkpoint-*.old"):
            whole = old.with_name(old.name[1:].removesuffix(".old"))
            if not whole.exists():
                old.replace(whole)
        for path in folder.glob(".checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints of a stage."""
    for path in checkpoints(folder)[:-keep]:
        gone = path.with_name(f".{path.name}.gone")  # a kill leaves no half of it by its name
        path.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the trained tensors into a checkpoint folder."""
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def write_final(tensors: dict[str, torch.Tensor], folder: Path, state: TrainerState) -> None:
    """Keep what a stage has trained until its graft is saved and noted, unless that was done.

    A run that is killed between the two goes on from here: the graft in its folder may be the
    stage's already, and would be trained a second time.

    Args:
        tensors: Those that are trained, at the stage's end.
        folder: Of the stage's checkpoints.
        state: Of the Trainer, after its last step.

    Raises:
        MMGraftError: As :func:`write_checkpoint`.
    """
    target = folder / f"checkpoint-{state.global_step}"

    def write(path: Path) -> None:
        save_tensors(tensors, path)
        state.save_to_json(str(path / "trainer_state.json"))

    if not target.is_dir():
        write_checkpoint(target, write)


@torch.no_grad()
def load_tensors(model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's tensors into the parameters that are trained now.

    Raises:
        UsageError: The checkpoint is corrupt, or holds other parameters than those trained now.
    """
    path = folder / TENSORS
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}); remove {folder} to go on from the one before"
        ) from error
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if saved.keys() != wanted.keys():
        odd = sorted(saved.keys() ^ wanted.keys())[0]
        raise UsageError(
            f"{folder} was written by another stage or graft: {odd} is in only one of them; "
            "go on with the recipe that wrote it, or begin anew with --restart"
        )
    for name, parameter in wanted.items():
        parameter.copy_(like(saved[name], parameter))


def read_progress(run: Path) -> dict[str, Any] | None:
    """Read what a run has done so far; None for a fresh run.

    It has ``recipe``, ``stages``, ``finished``, and ``trained_parameters`` of finished stages.

    Raises:
        UsageError: The file is corrupt.
    """
    path = run / FOLDER / PROGRESS
    if not path.is_file():
        return None
    todo = f"begin anew with: mmgraft train {run} --restart"
    data = read_json(path, todo)
    if not isinstance(data.get("finished"), list):
        raise UsageError(f"{path} is corrupt (no list of finished stages); {todo}")
    return data


def read_rows(run: Path) -> dict[str, Any]:
    """Read the fingerprints of the rows that the run was begun with; empty where they are lost."""
    try:
        return read_json(run / FOLDER / ROWS, "")
    except UsageError:
        return {}


def write_progress(run: Path, progress: Mapping[str, Any], name: str = PROGRESS) -> None:
    """Record what a run has done so far, or under ``ROWS`` by what the rows of stages are known."""
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    atomic_json(run / FOLDER / name, dict(progress))
