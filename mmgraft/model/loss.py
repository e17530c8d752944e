"""The language-model loss on supervised positions only, in chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 25
"""Logits computed at a time (positions x vocabulary): 128 MiB in fp32."""


def chunked_loss(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], vocab_size: int
) -> Tensor:
    """Sum of the cross-entropies, without ever holding logits of all positions.

    Args:
        hidden: Final hidden states of the supervised positions, ``(m, h)``.
        targets: Their next tokens, ``(m,)``.
        head: Hidden states to logits, ``(c, h) -> (c, vocab)``.
        vocab_size: Width of the logits; sets the chunk length.

    Returns:
        A scalar in fp32, in nats.
    """
    length = max(1, CHUNK_LOGITS // vocab_size)
    total = hidden.new_zeros((), dtype=torch.float32)

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float()  # (c, vocab)
        loss = F.cross_entropy(logits, targets.to(logits.device), reduction="sum")
        return loss.to(hidden.device)

    for start in range(0, hidden.shape[0], length):
        piece, wanted = hidden[start : start + length], targets[start : start + length]
        if torch.is_grad_enabled():
            total = total + checkpoint(part, piece, wanted, use_reentrant=False)
        else:
            total = total + part(piece, wanted)
    return total


def supervised(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where a position predicts a supervised token.

    Args:
        labels: ``(b, s)``, -100 where a token is not learned.

    Returns:
        A mask ``(b, s)`` of the positions before such tokens, and their targets ``(m,)`` in the
        order of the mask.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    mask = shifted != -100
    return mask, shifted[mask]
