"""Chosen modules of a base with their weights, without the rest of it."""

import copy
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from mmgraft.anatomy import Anatomy, examine, skeleton
from mmgraft.basefiles.tensors import TensorReader
from mmgraft.basefiles.whole import check_quantised, lacking, load_whole, quiet
from mmgraft.errors import UsageError
from mmgraft.progress import working


def examine_files(
    reader: TensorReader, config: PreTrainedConfig
) -> tuple[PreTrainedModel, Anatomy]:
    """Examine a base as transformers fills it from its files; of its tensors only names are read.

    A head with values of its own is not tied, whatever the config says: transformers compares it
    with the embedding.

    Returns:
        Its skeleton, and what was found.

    Raises:
        UsageError: The files lack tensors, or are stored in a form that cannot be loaded here.
    """
    check_quantised(config, reader.files.id)
    named = reader if _method(config) and not reader.files.slow else ()
    kinds = {entry.dtype for entry in map(reader.entry, named) if entry}
    if kinds and kinds <= {"F64", "F32", "F16", "BF16"}:
        raise UsageError(
            f"config.json of {reader.files.id} says that its weights are stored quantised "
            "(quantization_config), and none is; take that key out, or fetch the base again"
        )
    blank = skeleton(config)
    anatomy = examine(blank)
    if reader.files.gguf or _method(config):
        return blank, anatomy
    outline = load_whole(reader.files, device_map="meta")
    if anatomy.tied and not _is_tied(outline):
        paths = (anatomy.embedding_path, anatomy.head_path)
        both = read_modules(reader, config, paths, tied=True)
        anatomy = replace(anatomy, tied=_is_tied(both))
    return blank, anatomy


def _is_tied(model: PreTrainedModel) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return getattr(head, "weight", None) is embedding.weight


def read_layers(
    reader: TensorReader,
    config: PreTrainedConfig,
    layers: Collection[int],
    owns: Collection[str],
    anatomy: Anatomy,
) -> PreTrainedModel:
    """Read chosen parts of a base, and of its tensors only theirs.

    The base's own class is built on the meta device, everything that is not wanted is taken out
    of it, and transformers loads what is left, with the conversions that it has for the class
    (fused experts, renamed parts). Layers keep their number, and with it whatever the class
    derives from the number: sliding window, rotary embedding, kind of feed-forward.

    Args:
        reader: The base's tensors.
        config: The base's configuration; it is not changed.
        layers: Numbers of the layers, counted from 0.
        owns: Which of ``embedding``, ``norm`` (where there is one) and ``head`` to read; the head
            of a tied base is the embedding's tensor.
        anatomy: Anatomy of the same configuration.

    Returns:
        The base without all other parts, in eval mode on the CPU.

    Raises:
        UsageError: The base lacks tensors of these parts, or its checkpoint is quantised by
            another method than MXFP4, which is unpacked.
    """
    tied_head = "head" in owns and anatomy.tied
    paths = {name: getattr(anatomy, f"{name}_path") for name in owns}
    wanted = {f"{anatomy.layers_path}.{index}" for index in layers}
    wanted |= {path for path in paths.values() if path is not None}
    wanted |= {anatomy.embedding_path} if tied_head else set()
    return read_modules(reader, config, wanted, tied=tied_head)


def read_modules(
    reader: TensorReader,
    config: PreTrainedConfig,
    paths: Collection[str],
    dtype: torch.dtype | None = None,
    tied: bool = False,
) -> PreTrainedModel:
    """Read the modules at these paths; all others are taken out of the model that is returned.

    Args:
        reader: The base's tensors.
        config: The base's configuration; it is not changed.
        paths: Dotted names from the model itself, such as ``model.layers.3``.
        dtype: Dtype of the modules; by default the one that the base itself loads in.
        tied: The head is among them and is the embedding's tensor.

    Raises:
        UsageError: See :func:`read_layers`.
    """
    refuse_quantised(config, reader.files.id)
    blank = skeleton(config)
    reduced, config = _reduced(type(blank), set(paths)), copy.deepcopy(blank.config)
    config.tie_word_embeddings = tied
    return _load(reduced, config, reader, dtype)


def _reduced(base_class: type[PreTrainedModel], wanted: set[str]) -> type[PreTrainedModel]:
    """Make a class whose instances hold the wanted modules of the base class alone."""

    def __init__(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        base_class.__init__(self, config)
        _take_out(self, wanted, "")
        for part in self.modules():
            if isinstance(part, PreTrainedModel):
                vars(part)["_init_weights"] = partial(_initialise, part._init_weights)

    # transformers finds its weight conversions by the name of the class.
    names = {"__init__": __init__, "__module__": base_class.__module__}
    return type(base_class.__name__, (base_class,), names)


def _initialise(original: Callable[[nn.Module], None], module: nn.Module) -> None:
    with suppress(AttributeError):  # of a part that is taken out
        original(module)


def _take_out(module: nn.Module, wanted: set[str], prefix: str) -> None:
    for name, child in list(module._modules.items()):
        path = prefix + name
        if child is None or path in wanted:
            continue
        if any(goal.startswith(path + ".") for goal in wanted):
            _take_out(child, wanted, path + ".")
        elif isinstance(module, nn.ModuleList):
            del module._modules[name]
        else:
            module._modules[name] = nn.Identity()


def _load(
    reduced: type[PreTrainedModel],
    config: PreTrainedConfig,
    reader: TensorReader,
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    tensors = {key: reader.lazy(key) for key in reader}
    try:
        with working("reading the layers to copy") as work, quiet(work):
            loaded: Any = reduced.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype or own_dtype(config, reader),
                output_loading_info=True,
                # MXFP4, the one form in which gpt-oss is published, is unpacked
                quantization_config=Mxfp4Config(dequantize=True) if _method(config) else None,
            )
    except RuntimeError as error:  # sizes that differ, or experts that cannot be fused
        raise UsageError(lacking(reader.files.id)) from error
    model, report = loaded
    if report["missing_keys"]:
        raise UsageError(lacking(reader.files.id, report["missing_keys"]))
    return model


def own_dtype(config: PreTrainedConfig, reader: TensorReader) -> torch.dtype:
    """Return the dtype that a base loads in where no other is named."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else reader.main_dtype()


def _method(config: PreTrainedConfig) -> str | None:
    """Return the name of the method by which the checkpoint is quantised, or None."""
    stored: Any = getattr(config, "quantization_config", None)
    if not stored:
        return None
    return (stored if isinstance(stored, dict) else stored.to_dict()).get("quant_method", "unnamed")


def refuse_quantised(config: PreTrainedConfig, name: str) -> None:
    """Refuse a base whose tensors are read one by one, and are stored quantised.

    Raises:
        UsageError: With the method by which they are.
    """
    method = _method(config)
    if method not in (None, "mxfp4"):
        raise UsageError(
            f"the weights of {name} are stored quantised ({method}), and what a graft copies "
            "must not be; give the base with its full weights"
        )
