"""Write one workflow's graft: ``graft_config.json`` and ``graft.safetensors``."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from mmgraft.atomic import replace_together
from mmgraft.errors import UsageError
from mmgraft.model.files import graft_file
from mmgraft.model.sharded import gathered
from mmgraft.model.workflow import Workflow
from mmgraft.progress import working

if TYPE_CHECKING:
    from mmgraft.model.modeling import GraftedModel

Writer = Callable[[Path], object]

MAX_SHARD_SIZE = "5GB"
INDEX_NAME = f"{graft_file.WEIGHTS_NAME}.index.json"


def save_graft(
    model: "GraftedModel",
    folder: str | Path,
    workflow: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    write: bool = True,
) -> None:
    """Save the graft of one workflow; a base that was trained goes into ``folder/base``.

    Base, weights and config are replaced together: a killed save leaves all the earlier ones, or
    all the new ones. Where several processes hold a model in pieces all of them call this, and one
    writes.

    Args:
        model: The model.
        folder: Where to.
        workflow: Which one; default: the model's first.
        max_shard_size: Split larger weights, with an index.
        write: False for a process that only helps to gather.

    Raises:
        MMGraftError: The disk is full or not writable; earlier files are whole.
    """
    chosen = model.workflow(workflow)
    folder = Path(folder)
    now = chosen.record.model_copy(update={"state": chosen.graft.state()})
    record = _reachable(now, chosen, folder)
    if record.vision_features is None and model.vision_tower is not None:
        seen = graft_file.SeenFeatures(sample=model.vision_tower.sample())
        record = record.model_copy(update={"vision_features": seen})
    tensors = graft_tensors(chosen, write)
    if not (record.base_trained or model.base_is_trained):
        if write:
            write_graft(folder, record, tensors, max_shard_size)
        return
    if model.quantized:
        raise UsageError("a 4-bit base cannot have been trained; nothing of it is saved.")
    own = graft_file.BaseReference(id=f"./{graft_file.OWN_BASE}")
    beside = chosen.record.base.id == own.id
    original = record.trained_from or (None if beside else record.base)
    record = record.model_copy(update={"base": own, "base_trained": True, "trained_from": original})
    whole = gathered(model.base.state_dict(keep_vars=True), write) if model.in_step else None
    if write:
        first = {graft_file.OWN_BASE: lambda path: _write_base(model, path, own, whole)}
        write_graft(folder, record, tensors, max_shard_size, first)
    # The model stands beside its own base now; whatever lay beside the old one is named whole.
    chosen.record, chosen.origin = record, folder


def graft_tensors(workflow: Workflow, keep: bool = True) -> dict[str, Tensor]:
    """Return the new tensors of a workflow by their saved names, whole; tied ones once."""
    shared = {f"graft.{name}" for name in workflow.graft.shares()}
    given = workflow.state_dict(keep_vars=True)
    own = {name: tensor for name, tensor in given.items() if name not in shared}
    return {name: tensor.contiguous() for name, tensor in gathered(own, keep).items()}


def _reachable(
    record: graft_file.GraftFile, workflow: Workflow, folder: Path
) -> graft_file.GraftFile:
    """Return the record with whole paths for what lay beside the graft where it was loaded."""

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
    record: graft_file.GraftFile,
    tensors: dict[str, Tensor],
    max_shard_size: str = MAX_SHARD_SIZE,
    first: Mapping[str, Writer] | None = None,
) -> None:
    """Write weights and config in place of earlier ones. ``folder`` is made if it is missing.

    Args:
        folder: Where to.
        record: The config; read when all else is written.
        tensors: By their saved names.
        max_shard_size: Split larger weights, with an index.
        first: What else belongs to them, written before.

    Raises:
        MMGraftError: The disk is full or not writable; all is as it was.
    """
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="graft{suffix}.safetensors", max_shard_size=max_shard_size
    )
    metadata = {"format": "pt", "method": record.method, "workflow": record.workflow}
    writers = dict(first or {})
    for name, keys in split.filename_to_tensors.items():
        chosen = {key: tensors[key] for key in keys}
        writers[name] = partial(save_file, chosen, metadata=metadata)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        writers[INDEX_NAME] = lambda path: path.write_text(json.dumps(index, indent=2), "utf-8")
    writers["config.json"] = lambda path: path.write_text(record.dump_config(), "utf-8")
    writers[graft_file.CONFIG_NAME] = lambda path: path.write_text(record.dump(), "utf-8")
    old = {p.name for p in folder.glob("graft*.safetensors*") if not p.name.startswith(".")}
    with working(f"saving {folder}"):
        replace_together(folder, writers, gone=old - writers.keys())


def _write_base(
    model: "GraftedModel",
    folder: Path,
    reference: graft_file.BaseReference,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a trained base as an ordinary folder, and note its own fingerprint.

    The tokenizer of the base that it was trained from goes along: without it no text can be read.
    """
    from mmgraft.basefiles import copy_tokenizer, fingerprint, resolve

    model.base.save_pretrained(folder, state_dict=state)
    if model.base.name_or_path:  # empty for a base that was built in memory
        copy_tokenizer(Path(model.base.name_or_path), folder)
    reference.fingerprint = fingerprint(resolve(folder))
