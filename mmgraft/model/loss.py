"""The language-model loss on supervised positions only, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmgraft.grafts.computing import computes_on

CHUNK_LOGITS = 1 << 25
"""Logits computed at a time (positions x vocabulary): 128 MiB in fp32."""

BLOCK_LOGITS = 1 << 20
"""Logits that are held in fp32 while the cross-entropy reads a chunk: 4 MiB, as caches are large.

Eight times as many where starting a kernel is what costs."""


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
        logits = head(hidden)  # (c, vocab)
        loss = _CrossEntropy.apply(logits, targets.to(logits.device))
        return loss.to(hidden.device)

    count = hidden.shape[0]
    for start in range(0, count, length):
        piece, wanted = hidden[start : start + length], targets[start : start + length]
        if torch.is_grad_enabled() and start + length < count:
            total = total + checkpoint(part, piece, wanted, use_reentrant=False)
        else:  # the backward pass begins with the last chunk: its logits may stay until then
            total = total + part(piece, wanted)
    return total


class _CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of ``logits (c, vocab)`` in any dtype, computed in fp32.

    Nothing of the logits' size is kept beside them, and the backward pass makes their gradient and
    no more: torch's own keeps the log-probabilities too, and takes two such tensors to go back.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        parts = [logits[rows].float().logsumexp(dim=-1) for rows in _blocks(logits)]
        total = torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)  # (c,)
        ctx.save_for_backward(logits, targets, total)
        return (total - logits.gather(-1, targets[:, None])[:, 0].float()).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        logits, targets, total = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in _blocks(logits):
            part = logits[rows].float() if logits.dtype != torch.float32 else logits[rows].clone()
            part.sub_(total[rows, None]).exp_()  # probabilities
            part.scatter_add_(-1, targets[rows, None], part.new_full((len(part), 1), -1.0))
            out[rows] = part.mul_(grad)
        return out, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    size = BLOCK_LOGITS if computes_on(logits) == "cpu" else 8 * BLOCK_LOGITS
    length = max(1, size // logits.shape[-1])
    for start in range(0, logits.shape[0], length):
        yield slice(start, start + length)


def supervised(labels: Tensor) -> Tensor:
    """Return where a position predicts a supervised token.

    Args:
        labels: ``(b, s)``, -100 where a token is not supervised.

    Returns:
        A mask ``(b, s)`` of the positions before such tokens.
    """
    return F.pad(labels[:, 1:], (0, 1), value=-100) != -100
