"""A decoded token through the learners of a layer: few wide products for many small ones.

A single token leaves a card idle between kernels, so their number is what counts. The matrices of a
layer's learners are put side by side once a generation, and one product does for all of them. That
copy takes at most three quarters of the learners' own memory, and goes with the next prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmgraft.grafts.base import Pass
from mmgraft.grafts.wings.learners import Learner, rotation_of
from mmgraft.grafts.wings.reading import Remember, additive, attend, masks_of


@dataclass(frozen=True)
class Stacked:
    """Matrices side by side, of the learners that look (``q``) and of the one that is looked at."""

    names: tuple[str, ...]  # those that look
    heads: int
    down: Tensor  # (q + 2, r, h): queries of each, then keys and values of one
    up: Tensor  # (q + 2, h, r)
    lower: Tensor  # (q, r, h)
    lift: Tensor  # (h, q r)

    @classmethod
    def of(cls, looking: dict[str, Learner], seen: Learner) -> Stacked:
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
