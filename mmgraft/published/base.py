"""The base inside a published checkpoint: compared with the original, or written as its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from mmgraft.anatomy import skeleton
from mmgraft.basefiles import ModelFiles, TensorReader, load_config
from mmgraft.basefiles.tensor_files import write_shards
from mmgraft.errors import UsageError
from mmgraft.progress import counted
from mmgraft.published.names import Published
from mmgraft.published.source import TOWER_FILES, Source

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CONFIGS = {"LlamaForCausalLM": LlamaConfig, "Qwen2ForCausalLM": Qwen2Config}
_DECIDING = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters"),
    *("use_sliding_window", "attention_bias", "mlp_bias"),
)


def base_config(source: Source, published: Published) -> PreTrainedConfig:
    """Return the config of the checkpoint's base, as of a plain model.

    Raises:
        UsageError: When the base's tensors are not those of its config.
    """
    dtype = source.tensors[_EMBEDDING].dtype if _EMBEDDING in source.tensors else torch.float32
    config = _CONFIGS[published.base_class](
        **published.base_config, architectures=[published.base_class], dtype=dtype
    )
    wanted = {name: tuple(t.shape) for name, t in skeleton(config).state_dict().items()}
    found = {name: source.tensors[name].shape for name in published.base_tensors}
    if config.tie_word_embeddings:
        wanted.pop(_HEAD, None)
    for name in sorted(wanted.keys() | (found.keys() - {_HEAD})):
        if found.get(name) != wanted.get(name):
            raise UsageError(
                f"{source.name} is no whole {published.base_class}: tensor {name} has shape "
                f"{found.get(name, 'none')} and its config says {wanted.get(name, 'none')}; "
                "the download may be incomplete: fetch it again"
            )
    return config


def differs_from(source: Source, published: Published, files: ModelFiles) -> str | None:
    """Return the first difference between the checkpoint's base and another model, in words.

    Tensors stored in another dtype are equal when casting the other model's to the checkpoint's
    dtype gives the checkpoint's, bit for bit.
    """
    ours, theirs = base_config(source, published), load_config(files)
    if theirs.model_type != ours.model_type:
        return f"it is a {theirs.model_type} model, and the checkpoint's base is {ours.model_type}"
    for name in _DECIDING:
        one, other = getattr(ours, name, None), getattr(theirs, name, None)
        if one != other:
            return f"config field {name} is {other}, and {one} in the checkpoint"
    with TensorReader(files) as reader:
        return _tensor_difference(source, published, reader)


def _tensor_difference(source: Source, published: Published, reader: TensorReader) -> str | None:
    names = set(reader.keys())
    for name in counted("comparing tensors of the base", published.base_tensors):
        other = _EMBEDDING if name == _HEAD and name not in names else name
        if other not in names:
            return f"it has no tensor {name}"
        if tuple(reader.shape(other)) != source.tensors[name].shape:
            shapes = tuple(reader.shape(other)), source.tensors[name].shape
            return f"tensor {name} has shape {shapes[0]}, and {shapes[1]} in the checkpoint"
        if not _same(reader.get(other), source.tensors[name].read()):
            return f"tensor {name} has other values"
    # A head that the checkpoint leaves to its embedding.
    if _HEAD in names and _HEAD not in published.base_tensors:
        same = _same(reader.get(_HEAD), source.tensors[_EMBEDDING].read())
        return None if same else f"tensor {_HEAD} has other values"
    return None


def _same(theirs: Tensor, ours: Tensor) -> bool:
    return torch.equal(theirs.to(ours.dtype), ours)


def write_base(source: Source, published: Published, folder: Path) -> None:
    """Write the checkpoint's base as an ordinary model folder, tokenizer included."""
    config = base_config(source, published)
    tensors = {name: source.tensors[name] for name in published.base_tensors}
    if config.tie_word_embeddings and _HEAD in tensors:
        if torch.equal(tensors[_HEAD].read(), tensors[_EMBEDDING].read()):
            del tensors[_HEAD]
        else:
            config.tie_word_embeddings = False
    write_shards(folder, "model", tensors)
    config.save_pretrained(folder)
    for name in source.files.keys() - {"config.json", *TOWER_FILES}:
        shutil.copyfile(source.files[name], folder / name)


def base_bytes(source: Source, published: Published) -> int:
    """Size of the base's tensors."""
    return sum(source.tensors[name].nbytes for name in published.base_tensors)
