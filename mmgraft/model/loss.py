"""The language-model loss on supervised positions only, in chunks.

The last layer's feed-forward runs at the positions that are read alone: it looks at one position
at a time. Of a row with an image they are a small part: one layer's feed-forward is saved, forward
and backward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import pytorch_utils

from mmgraft.grafts.base import Graft
from mmgraft.grafts.computing import computes_on
from mmgraft.model.kernels.activations import KEEPS_ITS_INPUT
from mmgraft.patching import patched_forward

#: Logits computed at a time (positions x vocabulary): 128 MiB in fp32.
CHUNK_LOGITS = 1 << 25

#: Logits that are held in fp32 while the cross-entropy reads a chunk: 4 MiB, as caches are large.
#:
#: Eight times as many where starting a kernel is what costs.
BLOCK_LOGITS = 1 << 20


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


def last_layer(
    layers: Sequence[nn.Module], active: Sequence[tuple[Graft, Tensor | None]]
) -> nn.Module | None:
    """Return the layer that nothing but the norm and the head comes after, the same for all rows.

    None where there is no such layer, or a graft that reaches into its feed-forward needs to see
    whole rows there.

    Args:
        layers: The base's.
        active: Grafts of the pass, and the rows that run each (None: all).
    """
    last = len(layers) - 1
    after = [
        (graft, gate)
        for graft, gate in active
        if graft.active and graft.acts_on(last) and type(graft).after_layer is not Graft.after_layer
    ]
    if not after:
        inside = any(
            graft.active and graft.acts_on(last) and graft.changes_feed_forward(last)
            for graft, _ in active
        )
        return None if inside else layers[-1]
    (graft, gate), *others = after
    return graft.ends_with(last) if gate is None and not others else None


@contextmanager
def fed_at(layer: nn.Module, wanted: Tensor) -> Iterator[None]:
    """While the block lasts, the layer's feed-forward gives zeros where nobody reads.

    A feed-forward that is not known to look at one position at a time (experts, dropout, modules of
    other kinds) stays as it is.

    Args:
        layer: A decoder layer.
        wanted: Positions that are read, ``(b, s)``.
    """
    feed = getattr(layer, "mlp", None)
    if not isinstance(feed, nn.Module) or not _one_at_a_time(feed):
        yield
        return
    at = wanted.flatten().nonzero().squeeze(1)
    if not len(at):
        yield
        return

    def run(original: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or x.shape[:-1] != wanted.shape:
            return original(x, *args, **kwargs)
        there = at.to(x.device)
        out = original(x.flatten(0, 1).index_select(0, there)[None])  # (1, m, h)
        whole = out.new_zeros(x.shape).flatten(0, 1)
        return whole.index_copy(0, there, out[0]).view(x.shape)

    with patched_forward(feed, run):
        yield


_LINEAR = (nn.Linear, pytorch_utils.Conv1D)


def _one_at_a_time(feed: nn.Module) -> bool:
    parts = [part for part in feed.modules() if part is not feed]
    named = type(feed).__name__.endswith(("MLP", "Mlp", "FeedForward"))
    return named and not feed._parameters and all(map(_is_plain, parts))


def _is_plain(part: nn.Module) -> bool:
    if isinstance(part, nn.Dropout):
        return not (part.p and part.training)
    if type(part).__module__ == "transformers.activations":
        return not list(part.parameters())
    return isinstance(part, (*_LINEAR, *KEEPS_ITS_INPUT))
