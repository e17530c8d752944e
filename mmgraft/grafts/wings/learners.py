"""Wings' learners: multi-head, low-rank attention over the initial features (arXiv 2406.03496).

The keys that the learners of a layer read are their own kind's alone, or those of a cache. Both
give for each learner's queries ``(b, heads, s, d)``, not yet rotated, the values mixed for them in
the learner's rank, ``(b, s, r)``: exactly 0, with a zero gradient, for a query that sees no key.

A decoded token goes through few wide products for many small ones, because a single token leaves a
card idle between kernels. The matrices of a layer's learners are put side by side once a
generation, and one product does for all of them. That copy takes at most three quarters of the
learners' own memory, and goes with the next prefill.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmgraft.anatomy import Anatomy
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.grafts.base import IMAGE, TEXT, Packed, Pass
from mmgraft.grafts.lowrank import LowRank


class Learner(nn.Module):
    """One learner of one layer (equation 3 of the paper, LoRRA).

    ``softmax(X (1 + W_Q) [x (1 + W_K)]^T / sqrt(d)) x (1 + W_V) W_O`` with ``X`` the hidden states
    into the layer as queries and ``x`` the initial features as keys and values. ``W_O`` has no
    residual, so a new learner adds exactly 0.
    """

    def __init__(self, size: int, rank: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = LowRank(size, rank)
        self.key = LowRank(size, rank)
        self.value = LowRank(size, rank)
        self.output = LowRank(size, rank)

    def split(self, x: Tensor) -> Tensor:
        """``(b, s, h) -> (b, heads, s, d)``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def queries(self, hidden: Tensor, rotation: "Rotation | None" = None) -> Tensor:
        """Return queries ``(b, heads, s, d)`` of the hidden states into the layer ``(b, s, h)``."""
        q = self.split(hidden + self.query(hidden))
        return q if rotation is None else rotation(q)

    def keys_values(self, features: Tensor, rotation: "Rotation | None") -> tuple[Tensor, Tensor]:
        """Keys and values ``(b, heads, s, d)`` of the initial features ``(b, s, h)``."""
        k = self.split(features + self.key(features))
        v = self.split(features + self.value(features))
        return (k if rotation is None else rotation(k)), v

    def lower(self, mixed: Tensor) -> Tensor:
        """Return the first half of ``W_O`` on mixed values, ``(b, heads, s, d) -> (b, s, r)``."""
        return self.output.down(mixed.transpose(1, 2).flatten(2))

    def lift(self, low: Tensor) -> Tensor:
        """Return the second half, ``(b, s, r) -> (b, s, h)``: masks and shares are cheaper
        before it.
        """
        return self.output.up(low)


class Rotation:
    """Rotary embedding of the tokens' own positions, unscaled, over the learner's whole head.

    Tables and product are fp32; a bf16 input is rounded once, at the end.
    """

    def __init__(self, positions: Tensor, size: int, theta: float) -> None:
        steps = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
        angles = positions[:, None, :, None].float() * theta ** (-steps / size)  # (b, 1, s, d/2)
        cos, sin = angles.cos(), angles.sin()
        self.cos, self.sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def __call__(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return (x * self.cos + torch.cat([second, first], dim=-1) * self.sin).to(x.dtype)


def rotation_of(state: Pass, head_size: int, kind: int | None = None) -> Rotation | None:
    """Return the pass's rotation (of one kind's packed positions), or None for a base without
    rotary.
    """
    theta = state.anatomy.rope_theta
    if theta is None:
        return None
    key = ("rotation", head_size, kind)
    if key not in state.shared:
        positions = state.positions if kind is None else state.packed[kind].positions
        state.shared[key] = Rotation(positions, head_size, theta)
    return state.shared[key]


def learner_heads(anatomy: Anatomy, wanted: int | None) -> int:
    """Heads of a learner: the setting, else the base's. ``d = h / heads`` must be whole (and even).

    Raises:
        UsageError: The number does not fit the hidden size.
    """
    heads = wanted or anatomy.num_heads
    size = anatomy.hidden_size
    rotary = anatomy.rope_theta is not None
    if size % heads or (rotary and (size // heads) % 2):
        fitting = [n for n in range(1, 129) if size % n == 0 and not (rotary and size // n % 2)]
        raise UsageError(
            f"{heads} learner heads do not fit hidden size {size}"
            f"{' (each head needs an even size for rotary positions)' if rotary else ''}. "
            f"Set --heads to one of {', '.join(map(str, fitting))}."
        )
    return heads


KIND_OF = {"visual": IMAGE, "textual": TEXT}

#: Puts new keys and values into the layer's slot; gives those of all positions so far.
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

#: Called with each learner's queries, keys, mask, and the queries that see something.
Watch = Callable[[str, Tensor, Tensor, Tensor, Tensor], None]


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


class Stacked(Frozen):
    """Matrices side by side, of the learners that look (``q``) and of the one that is looked at."""

    names: tuple[str, ...]  # those that look
    heads: int
    down: Tensor  # (q + 2, r, h): queries of each, then keys and values of one
    up: Tensor  # (q + 2, h, r)
    lower: Tensor  # (q, r, h)
    lift: Tensor  # (h, q r)

    @classmethod
    def of(cls, looking: dict[str, Learner], seen: Learner) -> "Stacked":
        """Copy the matrices of the learners that look and of the one whose keys are new."""
        learners = looking.values()
        pairs = [*(learner.query for learner in learners), seen.key, seen.value]
        return cls(
            names=tuple(looking),
            heads=seen.heads,
            down=torch.stack([pair.down.weight for pair in pairs]),
            up=torch.stack([pair.up.weight for pair in pairs]),
            lower=torch.stack([learner.output.down.weight for learner in learners]),
            lift=torch.cat([learner.output.up.weight for learner in learners], dim=1),
        )

    def serves(self, looking: Sequence[str], weight: Tensor) -> bool:
        """Tell whether these are the matrices of learners by these names, where they are now."""
        here = (self.lift.device, self.lift.dtype) == (weight.device, weight.dtype)
        return here and self.names == tuple(looking)


def read_token(
    stacked: Stacked, hidden: Tensor, state: Pass, remember: Remember, shares: Tensor | None
) -> Tensor:
    """Return the routed sum of the learners at a token that is no image's, ``(b, 1, h)``.

    Args:
        stacked: Of the layer.
        hidden: What enters the layer, ``(b, 1, h)``.
        state: The pass, with a cache.
        remember: Puts keys and values into the layer's slot.
        shares: Of the visual and the textual learner, ``(b, 1, 2)``; None for 1.
    """
    names, count = stacked.names, len(stacked.names)
    text = state.features[:, 0]
    inputs = torch.stack([*[hidden[:, 0]] * count, text, text])  # (q + 2, b, h)
    low = torch.bmm(inputs, stacked.down.transpose(1, 2))
    made = inputs + torch.bmm(low, stacked.up.transpose(1, 2))
    made = made.unflatten(-1, (stacked.heads, 1, -1))  # (q + 2, b, heads, 1, d)
    turned, values = made[:-1], made[-1]
    rotation = rotation_of(state, made.shape[-1])
    turned = turned if rotation is None else rotation(turned)
    keys, values = remember(turned[-1], values)
    query = turned[:-1].squeeze(3).permute(1, 2, 0, 3)  # (b, heads, q, d)
    key, mask, blind = masks_of(state, names)
    mixed = attend(query, keys, values, additive(state, key, mask, query))
    mixed = mixed.permute(2, 0, 1, 3).flatten(2)  # (q, b, h)
    low = torch.bmm(mixed, stacked.lower.transpose(1, 2))  # (q, b, r)
    blind = blind[:, :, 0]  # (q, b, 1)
    if shares is None:
        low = low.masked_fill(blind, 0.0)
    else:
        chosen = shares[:, 0].t()[..., None]  # (2, b, 1)
        if count == 1:
            chosen = chosen[0 if names[0] == "visual" else 1][None]
        low = low * chosen.masked_fill(blind, 0.0).to(low)
    return F.linear(low.transpose(0, 1).flatten(1), stacked.lift)[:, None]
