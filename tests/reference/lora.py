"""LoRA behind a gate, slowly: each position of one row by itself, with merged weights of its own.

A position whose gate is open is multiplied by ``W + (alpha / r) B A``, any other by ``W``. Nothing
of mmgraft or transformers is used.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from reference.decoder import State, llama_logits

Adapters = Mapping[str, tuple[Tensor, Tensor]]
"""Name of a linear layer in the base -> its ``A (r, in)`` and ``B (out, r)``."""


def adapted(
    state: State, adapters: Adapters, scale: float, name: str, x: Tensor, gate: Tensor
) -> Tensor:
    """One linear layer over a row: x (s, in), gate (s,) booleans."""
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    out = []
    for position, is_open in zip(x, gate.tolist(), strict=True):
        own = weight
        if is_open and name in adapters:
            down, up = adapters[name]
            own = weight + scale * up @ down
        out.append(own @ position if bias is None else own @ position + bias)
    return torch.stack(out)


def lora_reference(
    state: State, adapters: Adapters, scale: float, config: Mapping, x: Tensor, gate: Tensor
) -> Tensor:
    """The logits (s, vocab) of one unpadded row through a Llama with adapters.

    Args:
        state: the base, by its own names.
        adapters: of the linear layers that have one.
        scale: alpha / r.
        config: the base's config.
        x: (s, h) token embeddings, with projected image features at image positions.
        gate: (s,) true where the adapters act.
    """

    def product(state: State, name: str, given: Tensor) -> Tensor:
        return adapted(state, adapters, scale, name, given, gate)

    return llama_logits(state, config, x, None, product)
