"""Identify a base, so that a graft is never put on another one unnoticed."""

import hashlib
import json
from typing import Any

import numpy as np
import torch

from mmgraft.basefiles.files import ModelFiles, load_config
from mmgraft.basefiles.tensor_files import TensorEntry, dtype_name
from mmgraft.basefiles.tensors import TensorReader
from mmgraft.progress import counted

#: Number of bytes that are hashed at each end of a tensor.
EDGE = 16 * 1024

# Fields that say where, by what or how a model was saved or is run, not what it computes.
_VOLATILE = {
    "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version",
    "transformers_weights", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward", "problem_type", "id2label", "label2id",
}  # fmt: skip


def fingerprint(files: ModelFiles, full: bool = False) -> dict[str, Any]:
    """Describe a base by its configuration and its tensors.

    Args:
        files: The base's files.
        full: Hash every byte as well, under the key ``full`` of each tensor; reads the whole base.

    Returns:
        ``{"config": {...}, "tensors": {name: {"dtype", "shape", "sha256"}}}``, ready for JSON.
        ``sha256`` covers the first and last 16 KiB of the tensor's bytes.

    Raises:
        UsageError: The files are broken or incomplete.
    """
    config = json.loads(load_config(files).to_json_string(use_diff=False))
    with TensorReader(files) as reader:
        keys = counted(f"hashing {files.id}", reader.keys())
        tensors = {key: _describe(reader, key, full) for key in keys}
    return {"config": _normalised(config), "tensors": tensors}


def compare_fingerprints(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Name the first difference between two fingerprints, or return None.

    Configurations are compared in the fields that both have: another version of transformers may
    know more fields. Whole hashes are compared where both have them.

    Returns:
        A clause such as ``config field 'rope_theta' was 500.0 and is 10000.0``.
    """
    return _config_difference(saved["config"], now["config"]) or _tensor_difference(
        saved["tensors"], now["tensors"]
    )


def _normalised(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            key: _normalised(value)
            for key, value in sorted(config.items())
            if key not in _VOLATILE and not key.startswith("_attn")
        }
    return config


def _config_difference(saved: dict, now: dict, prefix: str = "") -> str | None:
    for key in sorted(saved.keys() & now.keys()):
        before, after = saved[key], now[key]
        if isinstance(before, dict) and isinstance(after, dict):
            inner = _config_difference(before, after, f"{prefix}{key}.")
            if inner:
                return inner
        elif before != after:
            return f"config field '{prefix}{key}' was {before!r} and is {after!r}"
    return None


def _tensor_difference(saved: dict, now: dict) -> str | None:
    for name in sorted(saved.keys() | now.keys()):
        if name not in now:
            return f"tensor '{name}' is gone"
        if name not in saved:
            return f"tensor '{name}' is new"
        before, after = saved[name], now[name]
        for part in ("dtype", "shape"):
            if before[part] != after[part]:
                return f"tensor '{name}' was of {part} {before[part]} and is of {after[part]}"
        if before["sha256"] != after["sha256"] or (
            before.get("full", "") != after.get("full", "") and "full" in before and "full" in after
        ):
            return f"tensor '{name}' holds other values"
    return None


def _describe(reader: TensorReader, key: str, full: bool) -> dict[str, Any]:
    entry = reader.entry(key)
    if entry is None:
        tensor = reader.get(key).detach().cpu().contiguous()
        data = tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b""
        dtype, shape = dtype_name(tensor.dtype), list(tensor.shape)
    else:
        data, dtype, shape = _stored(entry), entry.dtype, list(entry.shape)
    described: dict[str, Any] = {"dtype": dtype, "shape": shape, "sha256": _edge_hash(data)}
    return {**described, "full": hashlib.sha256(data).hexdigest()} if full else described


def _stored(entry: TensorEntry) -> Any:
    """Map a tensor's bytes, of which only those that are hashed are read."""
    size = entry.end - entry.start
    if not size:
        return b""
    return np.memmap(entry.file, np.uint8, "r", offset=entry.start, shape=(size,)).data


def _edge_hash(data: Any) -> str:
    if len(data) <= 2 * EDGE:
        return hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256(data[:EDGE])
    digest.update(data[-EDGE:])
    return digest.hexdigest()
