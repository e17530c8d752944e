"""Write one workflow's graft: ``graft_config.json`` and ``graft.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from mmgraft.atomic import atomic_text, atomic_write
from mmgraft.errors import UsageError
from mmgraft.model.graft_file import CONFIG_NAME, OWN_BASE, WEIGHTS_NAME, GraftFile
from mmgraft.model.workflow import Workflow

if TYPE_CHECKING:
    from mmgraft.model.modeling import GraftedModel

MAX_SHARD_SIZE = "5GB"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"


def save_graft(
    model: GraftedModel,
    folder: str | Path,
    workflow: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Save the graft of one workflow; a base that was trained goes into ``folder/base``.

    Every file is written under a temporary name, synced and renamed, so a killed save leaves the
    earlier one whole.

    Args:
        model: The model.
        folder: Where to.
        workflow: Which one; default: the model's first.
        max_shard_size: Split larger weights, with an index.

    Raises:
        MMGraftError: The disk is full or not writable; earlier files are whole.
    """
    chosen = model.workflow(workflow)
    folder = Path(folder)
    if chosen.record.base_trained or model.base_is_trained:
        save_base(model, folder, chosen.record)
    record = _reachable(current_record(chosen), chosen, folder)
    write_graft(folder, record, graft_tensors(chosen), max_shard_size)


def graft_tensors(workflow: Workflow) -> dict[str, Tensor]:
    """The new tensors of a workflow by their saved names; tied ones once."""
    shared = {f"graft.{name}" for name in workflow.graft.shares()}
    return {
        name: tensor.detach().contiguous()
        for name, tensor in workflow.state_dict().items()
        if name not in shared
    }


def current_record(workflow: Workflow) -> GraftFile:
    """The record of a workflow as it is now."""
    return workflow.record.model_copy(update={"state": workflow.graft.state()})


def _reachable(record: GraftFile, workflow: Workflow, folder: Path) -> GraftFile:
    """The record with whole paths for what lay beside the graft where it was loaded."""

    def whole(name: str | None) -> str | None:
        if name is None or not name.startswith("./") or workflow.origin is None:
            return name
        beside = workflow.origin / name
        return name if (folder / name).is_dir() else str(beside.resolve())

    base = record.base.model_copy(update={"id": whole(record.base.id)})
    vision = record.vision.model_copy(update={"id": whole(record.vision.id)})
    return record.model_copy(update={"base": base, "vision": vision})


def write_graft(
    folder: Path,
    record: GraftFile,
    tensors: dict[str, Tensor],
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write weights, then the config. ``folder`` is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="graft{suffix}.safetensors", max_shard_size=max_shard_size
    )
    metadata = {"format": "pt", "method": record.method, "workflow": record.workflow}
    old = _weight_files(folder)
    if split.is_sharded:
        written = _write_shards(folder, split, tensors, metadata)
    else:
        _write(folder / WEIGHTS_NAME, tensors, metadata)
        written = {WEIGHTS_NAME}
    atomic_text(folder / CONFIG_NAME, record.dump())
    for name in old - written:
        (folder / name).unlink(missing_ok=True)


def _write_shards(
    folder: Path, split: Any, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> set[str]:
    """Shards under names that no earlier save uses; the index's renaming makes them the graft."""
    taken = _weight_files(folder)
    number = 0
    while any(name.startswith(f"graft-{number}-") for name in taken):
        number += 1
    names = {old: old.replace("graft-", f"graft-{number}-", 1) for old in split.filename_to_tensors}
    for old, keys in split.filename_to_tensors.items():
        _write(folder / names[old], {key: tensors[key] for key in keys}, metadata)
    weight_map = {key: names[old] for key, old in split.tensor_to_filename.items()}
    text = json.dumps({"metadata": split.metadata, "weight_map": weight_map}, indent=2)
    atomic_text(folder / INDEX_NAME, text)
    return {INDEX_NAME, *names.values()}


def _weight_files(folder: Path) -> set[str]:
    return {p.name for p in folder.glob("graft*.safetensors*") if not p.name.startswith(".")}


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def save_base(model: GraftedModel, folder: Path, record: GraftFile) -> None:
    """Write a trained base as an ordinary folder with its own fingerprint, and refer to it.

    The tokenizer of the base that it was trained from goes along: without it no text can be read.
    """
    from mmgraft.atomic import atomic_folder
    from mmgraft.basefiles import copy_tokenizer, fingerprint, resolve

    if model.quantized:
        raise UsageError("a 4-bit base cannot have been trained; nothing of it is saved.")

    def write(building: Path) -> None:
        model.base.save_pretrained(building)
        if model.base.name_or_path:  # empty for a base that was built in memory
            copy_tokenizer(Path(model.base.name_or_path), building)

    target = folder / OWN_BASE
    atomic_folder(target, write)
    record.base_trained = True
    record.base.id = f"./{OWN_BASE}"
    record.base.revision = None
    record.base.fingerprint = fingerprint(resolve(str(target)))
