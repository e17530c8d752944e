"""Where a graft's copies of base modules come from."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mmgraft.anatomy import Anatomy, decoder_layers, get_path, skeleton
from mmgraft.basefiles import BaseParts
from mmgraft.errors import UsageError


class LoadedParts:
    """Copies of the modules of a base in memory, or of its shape only.

    Args:
        model: A causal LM with the base's classes.
        anatomy: Where its parts are.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, anatomy

    def layer(self, index: int) -> nn.Module:
        return copy.deepcopy(decoder_layers(self.model, self.anatomy)[index])

    def embedding(self) -> nn.Module:
        return copy.deepcopy(get_path(self.model, self.anatomy.embedding_path))

    def norm(self) -> nn.Module:
        if self.anatomy.norm_path is None:
            raise UsageError("this base has no final norm to copy: add --no-norm.")
        return copy.deepcopy(get_path(self.model, self.anatomy.norm_path))

    def head(self) -> nn.Module:
        return copy.deepcopy(get_path(self.model, self.anatomy.head_path))


class ReadParts:
    """Modules that were read from a base's files, each handed out once and not copied again."""

    def __init__(self, parts: BaseParts, places: Sequence[int]) -> None:
        self.parts = parts
        self.layers = dict(zip(places, parts.layers, strict=True))

    def layer(self, index: int) -> nn.Module:
        return self.layers[index]

    def embedding(self) -> nn.Module:
        assert self.parts.embedding is not None
        return self.parts.embedding

    def norm(self) -> nn.Module:
        if self.parts.norm is None:
            raise UsageError("this base has no final norm to copy: add --no-norm.")
        return self.parts.norm

    def head(self) -> nn.Module:
        assert self.parts.head is not None
        return self.parts.head


def shape_parts(config: PreTrainedConfig, anatomy: Anatomy) -> LoadedParts:
    """Modules on the meta device: shapes to load a saved graft into."""
    plain = copy.deepcopy(config)
    vars(plain).pop("quantization_config", None)
    return LoadedParts(skeleton(plain), anatomy)


def share_config(module: nn.Module, config: PreTrainedConfig) -> None:
    """Let copied modules read the base's own config, so that they use its attention kernel."""
    for child in module.modules():
        if isinstance(getattr(child, "config", None), PreTrainedConfig):
            child.config = config  # type: ignore[assignment]


def check_places(places: Sequence[int], anatomy: Anatomy) -> None:
    """Refuse layers that cannot carry a graft, by name and with the reason."""
    for index in places:
        if index in anatomy.blocked:
            free = [str(i) for i in range(anatomy.num_layers) if i not in anatomy.blocked]
            raise UsageError(
                f"layer {index} of {anatomy.class_name} cannot carry a graft: "
                f"{anatomy.blocked[index]}. Layers that can: {', '.join(free) or 'none'}."
            )
