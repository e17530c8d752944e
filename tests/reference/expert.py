"""The visual expert, slowly: each position of one row by itself, with the weights of its kind.

An image position is multiplied by the expert's weights, any other by the base's; queries of both
look at keys of both. Nothing of mmgraft or transformers is used.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from reference.decoder import State, llama_logits

Experts = Mapping[str, tuple[Tensor, Tensor | None]]
"""Name of a linear layer in the base -> weight ``(out, in)`` and bias of its expert."""


def by_kind(state: State, experts: Experts, name: str, x: Tensor, image: Tensor) -> Tensor:
    """One linear layer over a row: x (s, in), image (s,) booleans."""
    of_base = state[f"{name}.weight"], state.get(f"{name}.bias")
    out = []
    for position, is_image in zip(x, image.tolist(), strict=True):
        weight, bias = experts.get(name, of_base) if is_image else of_base
        out.append(weight @ position if bias is None else weight @ position + bias)
    return torch.stack(out)


def positions_of(images: list[int | None], shared: bool) -> Tensor:
    """Positions (s,) of a row, an image number or None (text) at each of its tokens."""
    found: list[int] = []
    for at, image in enumerate(images):
        again = shared and at and image is not None and image == images[at - 1]
        found.append(found[-1] + (not again) if at else 0)
    return torch.tensor(found)


def expert_reference(
    state: State, experts: Experts, config: Mapping, x: Tensor, image: Tensor, positions: Tensor
) -> Tensor:
    """The logits (s, vocab) of one unpadded row through a Llama with experts.

    Args:
        state: the base, by its own names.
        experts: of the linear layers that have one.
        config: the base's config.
        x: (s, h) token embeddings, with projected image features at image positions.
        image: (s,) true at image positions.
        positions: (s,) what queries and keys are rotated by.
    """

    def product(state: State, name: str, given: Tensor) -> Tensor:
        return by_kind(state, experts, name, given, image)

    return llama_logits(state, config, x, positions, product)
