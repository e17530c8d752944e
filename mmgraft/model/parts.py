"""Where a graft's copies of base modules come from."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mmgraft.anatomy import Anatomy, decoder_layers, examine, get_path, skeleton
from mmgraft.errors import UsageError


class LoadedParts:
    """Copies of a base's modules: of one in memory, of its shape only, or of some of its layers.

    Args:
        model: A causal LM with the base's classes.
        anatomy: Where its parts are.
        numbers: Base layer -> layer of ``model``, for a model that holds some layers only.
    """

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, numbers: dict[int, int] | None = None
    ) -> None:
        self.model, self.anatomy, self.numbers = model, anatomy, numbers

    def layer(self, index: int) -> nn.Module:
        number = index if self.numbers is None else self.numbers[index]
        return copy.deepcopy(decoder_layers(self.model, self.anatomy)[number])

    def embedding(self) -> nn.Module:
        return copy.deepcopy(get_path(self.model, self.anatomy.embedding_path))

    def norm(self) -> nn.Module:
        if self.anatomy.norm_path is None:
            raise UsageError("this base has no final norm to copy: add --no-norm.")
        return copy.deepcopy(get_path(self.model, self.anatomy.norm_path))

    def head(self) -> nn.Module:
        return copy.deepcopy(get_path(self.model, self.anatomy.head_path))


def shape_parts(config: PreTrainedConfig) -> LoadedParts:
    """Modules on the meta device: shapes to load a saved graft into."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    model = skeleton(plain)
    return LoadedParts(model, examine(model))


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
