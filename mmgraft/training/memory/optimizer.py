"""Bytes of an optimizer's state, and of what its step holds for a moment."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mmgraft.recipes.recipe import Optimizer

_WHOLE = 4096  # bitsandbytes keeps the state of smaller tensors in 32 bits
_PAGED = 100_000  # and pages only that of larger ones
_BLOCK = 256  # moments that share an fp32 constant


def state_bytes(
    model: nn.Module, trained: Iterable[nn.Parameter], optimizer: Optimizer, device: str
) -> int:
    """Bytes of both moments on the device where the parameters are.

    AdamW keeps two fp32 numbers for each; in 8 bits one byte each and a constant for 256, where
    embeddings and tensors under 4096 numbers keep fp32. Pages on CUDA lie in main memory.
    """
    if optimizer == "adamw":
        return sum(8 * parameter.numel() for parameter in trained)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    paged = optimizer == "paged_adamw_8bit" and device == "cuda"
    total = 0
    for parameter in trained:
        size = parameter.numel()
        if paged and size >= _PAGED:
            continue
        whole = id(parameter) in tables or size < _WHOLE
        total += 8 * size if whole else 2 * size + 2 * 4 * -(-size // _BLOCK)
    return total


def scratch_bytes(trained: Iterable[nn.Parameter], optimizer: Optimizer, device: str) -> int:
    """What a step holds beside the state: roots of the second moments.

    On CUDA torch takes all parameters together, elsewhere one by one with two copies.
    """
    if optimizer != "adamw":
        return 0
    sizes = [4 * parameter.numel() for parameter in trained]
    return sum(sizes) if device == "cuda" else 2 * max(sizes, default=0)
