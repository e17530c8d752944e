"""The keys that the learners of a layer read: their own kind's alone, or those of a cache.

Both give for each learner's queries ``(b, heads, s, d)``, not yet rotated, the values mixed for
them in the learner's rank, ``(b, s, r)``: exactly 0, with a zero gradient, for a query that sees no
key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mmgraft.grafts.base import IMAGE, TEXT, Packed, Pass
from mmgraft.grafts.wings.learners import Learner, rotation_of

KIND_OF = {"visual": IMAGE, "textual": TEXT}

Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Puts new keys and values into the layer's slot; gives those of all positions so far."""

Watch = Callable[[str, Tensor, Tensor, Tensor, Tensor], None]
"""Called with each learner's queries, keys, mask, and the queries that see something."""


def read_packed(
    learners: Mapping[str, Learner],
    queries: Mapping[str, Tensor],
    state: Pass,
    remember: Remember | None,
) -> list[Tensor]:
    """From keys of each learner's own kind, in a pass that begins its rows."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    lowered = []
    for name, query in queries.items():
        kind, size = KIND_OF[name], query.shape[-1]
        packed = state.packed[kind]
        rotation, own = rotation_of(state, size), rotation_of(state, size, kind)
        found[name] = learners[name].keys_values(packed.features, own)
        query = query if rotation is None else rotation(query)
        mask = additive(state, ("packed", kind), packed.mask, query)
        low = learners[name].lower(attend(query, *found[name], mask))
        lowered.append(torch.where(packed.seen, low, 0.0))
    if remember is not None and found:
        spread = {name: _spread(KIND_OF[name], pair, state) for name, pair in found.items()}
        remember(*_by_kind(spread, state))
    return lowered


def read_all(
    learners: Mapping[str, Learner],
    queries: Mapping[str, Tensor],
    state: Pass,
    remember: Remember | None,
    watch: Watch | None = None,
) -> list[Tensor]:
    """From keys of all positions so far: one reading of them serves all learners."""
    if not queries and remember is None:
        return []
    made = {
        name: learner.keys_values(state.features, None)
        for name, learner in learners.items()
        if name != "visual" or state.new_image or len(learners) == 1
    }
    keys, values = _by_kind(made, state)
    rotation = rotation_of(state, keys.shape[-1])
    together = torch.cat([*queries.values(), keys], dim=1)  # (b, learners * heads + heads, s, d)
    together = together if rotation is None else rotation(together)
    *asking, keys = together.chunk(len(queries) + 1, dim=1)
    if remember is not None:
        keys, values = remember(keys, values)
    if not queries:
        return []
    if watch is not None:
        for name, query in zip(queries, asking, strict=True):
            watch(name, query, keys.to(query.dtype), *state.visible(KIND_OF[name]))
    key, mask, blind = masks_of(state, queries)
    query = torch.cat(asking, dim=2)  # (b, heads, learners * s, d)
    mixed = attend(query, keys, values, additive(state, key, mask, query))
    parts = zip(queries, mixed.chunk(len(queries), dim=2), blind, strict=True)
    return [learners[name].lower(part).masked_fill(none, 0.0) for name, part, none in parts]


def masks_of(state: Pass, names: Iterable[str]) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Return what learners may look at among all keys so far, made once for all layers.

    Returns:
        A name of it in the pass; the mask ``(b, 1, learners * s, S)``, learner by learner; and
        ``(learners, b, s, 1)``, true for queries that see no key.
    """
    key = ("all", *names)
    if key not in state.shared:
        masks, seen = zip(*(state.visible(KIND_OF[name]) for name in key[1:]), strict=True)
        state.shared[key] = torch.cat(masks, dim=2), ~torch.stack(seen)
    return key, *state.shared[key]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Values mixed for queries ``(b, heads, q, d)``; ``mask`` is added to the scores."""
    key, value = key.to(query.dtype), value.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def additive(state: Pass, name: object, mask: Tensor, query: Tensor) -> Tensor:
    """Return a mask as kernels add it, made once for all layers: of each layer's own it would be
    kept.
    """
    kind, dtype = query.device.type, query.dtype
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)  # what the kernel gets
    key = ("additive", name, dtype)
    if key not in state.shared:
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        state.shared[key] = added.masked_fill_(~mask, float("-inf"))
    return state.shared[key]


def _by_kind(pairs: Mapping[str, tuple[Tensor, ...]], state: Pass) -> tuple[Tensor, Tensor]:
    """Keys and values ``(b, heads, s, d)`` of each position by its own kind's learner."""
    if len(pairs) == 1:
        ((keys, values),) = pairs.values()
        return keys, values
    image = (state.kinds == IMAGE)[:, None, :, None]
    both = zip(pairs["visual"], pairs["textual"], strict=True)
    keys, values = (torch.where(image, visual, textual) for visual, textual in both)
    return keys, values


def _spread(kind: int, pair: tuple[Tensor, Tensor], state: Pass) -> tuple[Tensor, ...]:
    """Packed keys and values ``(b, heads, K, d)`` at their columns, ``(b, heads, s, d)``."""
    packed: Packed = state.packed[kind]
    shape = *pair[0].shape[:2], state.kinds.shape[1], pair[0].shape[3]
    columns = packed.columns[:, None, :, None].expand_as(pair[0])
    return tuple(part.new_zeros(shape).scatter(2, columns, part) for part in pair)
