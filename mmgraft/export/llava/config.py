"""The config of an exported LLaVA model: the base's own, with the inserted layers in it."""

from collections.abc import Iterator, Sequence, Set
from typing import Any, Literal

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig
from transformers.initialization import no_init_weights

from mmgraft.anatomy import decoder_layers, examine, get_path, skeleton
from mmgraft.errors import UsageError
from mmgraft.export.folder import NOTE_KEY
from mmgraft.export.llava.fit import Ingredients
from mmgraft.version import __version__

_COUNT = "num_hidden_layers"
_NOT_STRUCTURE = {"layer_idx", "layer_index", "training"}  # and what else numbers a layer


def llava_config(made_of: Ingredients, image_token: int, vocab_size: int) -> LlavaConfig:
    """Return the config of the whole model.

    Args:
        made_of: The parts.
        image_token: Id that stands for an image position.
        vocab_size: Rows of embedding and head.

    Raises:
        UsageError: The base's config cannot describe a deeper decoder.
    """
    sources = [layer.index for layer in made_of.layers]
    text = stretch(made_of.base_config, sources)
    _name(text, vocab_size=vocab_size, tie_word_embeddings=made_of.tied, dtype=made_of.dtype)
    tower = made_of.tower
    vision = type(tower.model.config).from_dict(tower.model.config.to_dict())
    _name(vision, dtype=made_of.dtype)
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        image_seq_length=tower.num_patches,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=select_strategy(made_of),
        vision_feature_layer=tower.feature_map.layer,
        multimodal_projector_bias=True,
        tie_word_embeddings=made_of.tied,
    )
    _name(config, dtype=made_of.dtype, architectures=[LlavaForConditionalGeneration.__name__])
    setattr(config, NOTE_KEY, _note(made_of))
    return config


def select_strategy(made_of: Ingredients) -> Literal["default", "full"]:
    """LLaVA's word for what to do with the tower's class token: leave it out, or there is none."""
    return "default" if made_of.tower.feature_map.prefix else "full"


def stretch(config: PreTrainedConfig, sources: Sequence[int]) -> PreTrainedConfig:
    """Return a base's config for a decoder whose layer ``j`` is built as its layer ``sources[j]``.

    Every list with one entry a layer (``layer_types``, ``no_rope_layers``, ...) is stretched, and
    every list of layer numbers (``mlp_only_layers``) renumbered.

    Raises:
        UsageError: A layer would be built differently: the class derives something from a layer's
            number that no list of its config holds.
    """
    count = config.attribute_map.get(_COUNT, _COUNT)
    values = config.to_dict()
    before = config.num_hidden_layers
    if list(sources) == list(range(before)):
        return type(config).from_dict(values)
    of_every_config = set(PreTrainedConfig().to_dict())
    for key, value in values.items():
        if isinstance(value, list | tuple) and key not in of_every_config:
            if _holds_numbers(key, value, before):
                values[key] = [j for j, source in enumerate(sources) if source in value]
            elif len(value) == before and not key.endswith(("token_id", "token_ids")):
                values[key] = [value[source] for source in sources]
    if count in values:  # NemotronH counts its list of kinds
        values[count] = len(sources)
    try:
        stretched = type(config).from_dict(values)
        reason = _difference(config, stretched, sources)
    except (ValueError, TypeError, UsageError) as error:
        raise _indescribable(config, sources, str(error).partition("\n")[0]) from error
    if reason is not None:
        raise _indescribable(config, sources, reason)
    return stretched


def _indescribable(config: PreTrainedConfig, sources: Sequence[int], reason: str) -> UsageError:
    return UsageError(
        f"a {config.model_type} base with {len(sources)} layers cannot be described by its "
        f"config: {reason}. Use --to full for one folder that mmgraft loads."
    )


def empty_llava(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """Return the model on the meta device: every name and shape, no memory.

    Raises:
        UsageError: Transformers cannot build it around this base.
    """
    try:
        with torch.device("meta"), no_init_weights():
            model = LlavaForConditionalGeneration(config).eval()
        model.tie_weights()
    except Exception as error:  # whatever a class may raise over a config it was not made for
        kind = config.text_config.model_type  # type: ignore[union-attr]
        raise UsageError(
            f"transformers cannot build LLaVA around a {kind} decoder ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}). Use --to full for one folder that mmgraft loads."
        ) from error
    return model


def _name(config: PreTrainedConfig, **values: Any) -> None:
    """Set fields, and forget where a part came from, how it was packed and its class alone."""
    config._name_or_path = ""
    vars(config).pop("quantization_config", None)  # MXFP4 experts are unpacked when they are read
    for key, value in {"architectures": None, **values}.items():
        setattr(config, key, value)


def _note(made_of: Ingredients) -> dict[str, Any]:
    record = made_of.record
    return {
        "version": __version__,
        "method": record.method,
        "workflow": record.workflow,
        "base": record.base.id if not record.base.id.startswith((".", "/")) else None,
        "base_revision": record.base.revision,
        "inserted_after": made_of.inserted,
        "note": made_of.text_note,
    }


def _holds_numbers(key: str, value: Sequence[Any], layers: int) -> bool:
    """Return whether a list holds numbers of layers, each once."""
    numbers = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    return (
        key.endswith(("_layers", "_layer_ids", "_layer_indices"))
        and numbers
        and len(set(value)) == len(value)
        and all(0 <= item < layers for item in value)
    )


def _difference(
    before: PreTrainedConfig, after: PreTrainedConfig, sources: Sequence[int]
) -> str | None:
    """In words, the first thing in which a layer differs from the one it is to be a copy of."""
    old, new = skeleton(before), skeleton(after)
    anatomy = examine(old)
    old_layers = decoder_layers(old, anatomy)
    new_layers = get_path(new, examine(new).layers_path)
    assert isinstance(new_layers, nn.ModuleList)
    for j, source in enumerate(sources):
        pair = (old_layers[source], new_layers[j])
        one, other = (dict(_structure(layer, anatomy.layer_numbers)) for layer in pair)
        # The outermost first: a feed-forward of another class, not each thing inside it.
        for key in sorted(one.keys() | other.keys(), key=lambda key: (key.count("."), key)):
            if one.get(key) != other.get(key):
                return (
                    f"its layer {j} would have {key} = {other.get(key)}, and layer {source} of the "
                    f"base has {one.get(key)}"
                )
    return None


def _structure(layer: nn.Module, numbers: Set[str]) -> Iterator[tuple[str, Any]]:
    """Yield what a layer is built of: classes, shapes, and plain settings such as a window."""
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        yield f"{prefix}class", type(module).__name__
        for key, value in vars(module).items():
            plain = isinstance(value, int | float | str | tuple | type(None))
            if plain and not key.startswith("_") and key not in _NOT_STRUCTURE | numbers:
                yield prefix + key, value
    for path, parameter in layer.named_parameters():
        yield path, tuple(parameter.shape)
