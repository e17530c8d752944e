"""The last layer's feed-forward at the positions that are read, instead of at all of them.

A feed-forward looks at one position at a time, and of what the last layer gives only supervised
positions are read. Of a row with an image that is a small part: one layer's feed-forward is saved,
forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import pytorch_utils

from mmgraft.grafts.base import Graft
from mmgraft.model.kernels.activations import KEEPS_ITS_INPUT
from mmgraft.patching import patched_forward


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
