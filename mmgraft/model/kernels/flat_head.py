"""Heads read positions as one matrix, which torch multiplies without copying the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from mmgraft.anatomy import get_path
from mmgraft.model.modeling import GraftedModel
from mmgraft.patching import patched_forward


@contextmanager
def flat_heads(model: GraftedModel) -> Iterator[None]:
    """Give every head ``(b * s, h)`` for ``(b, s, h)`` while the block lasts.

    ``generate`` hands a head the last position of each row, which is a view with gaps. torch then
    repeats the head's weight for every row of the batch before it multiplies: with a vocabulary of
    49,152 that is most of the time of a batch. The same products are made either way; sums may
    round differently, so this is not for proofs of identity.
    """
    heads = [get_path(model.base, model.anatomy.head_path)]
    heads += [one.graft.head for one in model._workflow_list() if one.graft.head is not None]
    with ExitStack() as stack:
        for head in heads:
            stack.enter_context(patched_forward(head, _flat))
        yield


def _flat(original: Any, hidden: Tensor) -> Tensor:
    if hidden.dim() != 3:
        return original(hidden)
    return original(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
