"""Summary of a model or a graft for ``mmgraft inspect``, without loading any weights."""

from dataclasses import field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.grafts.registry import methods
from mmgraft.model.files.graft_file import CONFIG_NAME, WEIGHTS_NAME, GraftFile

if TYPE_CHECKING:
    from torch import nn

    from mmgraft.basefiles import ModelFiles

_SIZES = {
    "hidden size": "hidden_size",
    "heads": "num_heads",
    "key-value heads": "num_kv_heads",
    "head size": "head_dim",
    "vocabulary": "vocab_size",
    "positions": "max_positions",
    "sliding window": "sliding_window",
    "tied head": "tied",
}


class LayerRow(Frozen):
    """One decoder layer; ``refused`` is the reason why it cannot carry a graft."""

    index: int
    kind: str
    attention: str
    parameters: int
    bytes: int
    refused: str | None


class ModelSummary(Frozen):
    """A base: sizes, layers, and what cannot be grafted on it."""

    id: str
    revision: str | None
    model_class: str
    model_type: str
    dtype: str
    parameters: int
    bytes: int
    sizes: dict[str, Any]
    layers: list[LayerRow]
    parts: dict[str, int]  # parameters outside the layers
    refusals: dict[str, str] = field(default_factory=dict)  # method -> why it cannot be used


class PartRow(Frozen):
    """Tensors that belong together in a graft's file."""

    part: str
    tensors: int
    parameters: int
    bytes: int


class GraftSummary(Frozen):
    """A graft: what it adds to which base, and what it does not promise."""

    folder: str
    method: str
    workflow: str
    config: dict[str, Any]
    base: str
    base_revision: str | None
    base_trained: bool
    tower: str
    feature_layer: int | None
    projector: dict[str, Any]
    parts: list[PartRow]
    parameters: int
    bytes: int
    lacks: dict[str, str]  # invariant -> why it does not hold


def locate(name: str, revision: str | None = None) -> "Path | ModelFiles":
    """Return the folder of a graft, or the files of a model; of what is on the Hub, no model's
    weights.

    Raises:
        UsageError: When there is nothing of that name.
    """
    from mmgraft.aliases import resolve_alias
    from mmgraft.basefiles import ModelFiles, resolve
    from mmgraft.basefiles.files import fetch

    path = Path(name).expanduser()
    if (path / CONFIG_NAME).is_file():
        return path
    if path.exists() or name.startswith((".", "/", "~")):
        return resolve(name, revision)
    name = resolve_alias(name)
    folder = fetch(name, revision, ["config.json", CONFIG_NAME])
    if (folder / CONFIG_NAME).is_file():
        return fetch(name, revision, [CONFIG_NAME, "graft*.safetensors*"])
    if (folder / "config.json").is_file():
        return ModelFiles(name, folder, folder.name)
    return resolve(name, revision)


def summarise_model(files: "ModelFiles") -> ModelSummary:
    """Examine a base from its config alone.

    Raises:
        UsageError: When it is no causal language model that transformers knows.
    """
    import torch

    from mmgraft.anatomy import decoder_layers, examine, get_path, skeleton
    from mmgraft.basefiles import load_config
    from mmgraft.model.trial import refusal

    config = load_config(files)
    model = skeleton(config)
    anatomy = examine(model)
    dtype = getattr(config, "dtype", None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    layers = [
        LayerRow(
            index=index,
            kind=type(layer).__name__,
            attention=anatomy.layer_types[index],
            parameters=_count(layer),
            bytes=_count(layer) * dtype.itemsize,
            refused=anatomy.blocked.get(index),
        )
        for index, layer in enumerate(decoder_layers(model, anatomy))
    ]
    paths = {"embedding": anatomy.embedding_path, "final norm": anatomy.norm_path}
    paths["head"] = anatomy.head_path
    parts = {name: _count(get_path(model, path)) for name, path in paths.items() if path}
    if anatomy.tied:
        parts["head"] = 0
    total = _count(model)
    parts["other"] = total - sum(parts.values()) - sum(layer.parameters for layer in layers)
    reasons = {name: refusal(one, anatomy, model) for name, one in methods().items()}
    return ModelSummary(
        id=files.id,
        revision=files.revision,
        model_class=anatomy.class_name,
        model_type=anatomy.model_type,
        dtype=str(dtype).removeprefix("torch."),
        parameters=total,
        bytes=total * dtype.itemsize,
        sizes={name: getattr(anatomy, field) for name, field in _SIZES.items()},
        layers=layers,
        parts=parts,
        refusals={name: reason for name, reason in reasons.items() if reason},
    )


def summarise_graft(folder: Path) -> GraftSummary:
    """Examine a graft from its config and the headers of its weight files.

    Raises:
        UsageError: When the config or a weight file is missing, corrupt or newer than this mmgraft.
    """
    record = GraftFile.read(folder)
    rows = graft_parts(folder, record.method)
    return GraftSummary(
        folder=str(folder),
        method=record.method,
        workflow=record.workflow,
        config=record.config,
        base=record.base.id,
        base_revision=record.base.revision,
        base_trained=record.base_trained,
        tower=record.vision.name,
        feature_layer=record.vision.feature_layer,
        projector={"kind": record.projector.kind, **record.projector.model_dump()},
        parts=rows,
        parameters=sum(row.parameters for row in rows),
        bytes=sum(row.bytes for row in rows),
        lacks=lacking(record),
    )


def graft_parts(folder: Path, method: str) -> list[PartRow]:
    """Count the tensors of a graft's files by part, as its method names the parts.

    Raises:
        UsageError: A weight file is missing or damaged.
    """
    from mmgraft.basefiles.tensor_files import read_headers

    entries = read_headers(folder, "graft")
    if not entries:
        raise UsageError(f"{folder} lacks {WEIGHTS_NAME}: copy it there, or graft again")
    rows: dict[str, PartRow] = {}
    for name, entry in entries.items():
        part = _part(name, method)
        old = rows.get(part, PartRow(part, 0, 0, 0))
        count, size = prod(entry.shape), entry.end - entry.start
        rows[part] = PartRow(part, old.tensors + 1, old.parameters + count, old.bytes + size)
    return list(rows.values())


def lacking(record: GraftFile) -> dict[str, str]:
    """Return what a graft does not promise, each with the reason."""
    promises = record.promises
    if record.base_trained and not promises.text:
        why = "the base was trained: they are the trained base's"
        promises = replace(promises, text=why)
    return promises.broken()


def limits(record: GraftFile) -> dict[str, str]:
    """Return what one must know to use a graft: :func:`lacking` beside text and a fresh start."""
    return replace(record.promises, text="", fresh="").broken()


def _count(module: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _part(tensor: str, method: str) -> str:
    """Return the part that a tensor is counted with, as its method names it."""
    inside = tensor.removeprefix("graft.")
    if inside == tensor or method not in methods():
        return inside.split(".")[0]
    return methods()[method].part_of(inside)
