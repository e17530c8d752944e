"""Wings as the published code computes it (`variant: official`), defects included.

It exists to load published checkpoints with equal logits, and promises none of the invariants that
the paper's form keeps: later tokens change earlier outputs, rows of one batch change each other,
nothing can be cached. Source: the published implementation of arXiv 2406.03496, as described by
what it computes; how it departs from the paper is told in docs/methods.md.

What all layers share is computed once for each forward as an `OfficialPlan`:

    plan = plan_official(initial, attention_mask, kinds, image_features, system_length=14)
    hidden = hidden + learners(hidden, plan, attention=weights)      # in every layer

where `hidden` is the residual plus the attention's output, before the layer's second norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmgraft.errors import UsageError

ROUTER_WIDTH = 4096
"""Columns of the published router: a longer row has no weights."""


@dataclass(frozen=True)
class OfficialPlan:
    """What the learners of every layer look at in one forward.

    Attributes:
        image_features: (b, p, h) keys of the visual learner, or None when no image was given.
        image_positions: (b, p) their positions.
        text_features: (b, k, h) keys of the textual learner.
        text_positions: (b, k) their positions.
        text_mask: (b, 1, s, k) fp32, added to the textual learner's scores.
        image_gate: (b, 1, 1) 0 or 1, the visual learner's factor in the first of the two additions.
    """

    image_features: Tensor | None
    image_positions: Tensor | None
    text_features: Tensor
    text_positions: Tensor
    text_mask: Tensor
    image_gate: Tensor


def plan_official(
    initial: Tensor,
    attention_mask: Tensor | None,
    kinds: Tensor | None,
    image_features: Tensor | None,
    system_length: int,
) -> OfficialPlan:
    """Lay out the learners' keys for one right-padded batch.

    Args:
        initial: (b, s, h) input embeddings with the projected image features in place.
        attention_mask: (b, s) 1 for real positions, which come first in each row; None for all.
        kinds: (b, s) 0 text, 1 image; at most one image a row. None for no image.
        image_features: (b, p, h) projected features, one image for each row, a dummy one for a row
            without an image. None takes them from `initial` when every row has an image, and
            leaves the visual learner out when no row has one.
        system_length: tokens of the system prompt, which are no keys of the textual learner.

    Raises:
        UsageError: for left padding, for several images in a row, for a batch in which only some
            rows have an image and `image_features` is None, and for a row longer than the router.
    """
    batch, length, _ = initial.shape
    if length > ROUTER_WIDTH:
        raise UsageError(
            f"the row has {length} positions and the published Wings router {ROUTER_WIDTH} columns;"
            f" shorten the prompt to {ROUTER_WIDTH} positions, image tokens counted"
        )
    if attention_mask is None:
        attention_mask = torch.ones(initial.shape[:2], dtype=torch.long, device=initial.device)
    real = attention_mask.bool()  # (b, s)
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise UsageError(
            "Wings `variant: official` takes right-padded batches only; "
            'set padding_side="right", or run the rows one by one'
        )
    initial = initial * real[..., None].to(initial.dtype)
    starts, image_length = _image_starts(real, kinds)
    if image_features is None and image_length:
        image_features = _cut_images(initial, kinds, image_length)
    image_positions = None
    if image_features is not None:
        image_length = image_features.shape[1]
        shown = min(image_length, length)
        image_features = image_features[:, :shown]
        offsets = torch.arange(shown, device=initial.device)
        image_positions = torch.tensor(starts, device=initial.device)[:, None] + offsets  # (b, p)
    positions, fillers = _text_keys(starts, length, image_length, system_length)
    text_positions = torch.tensor(positions, dtype=torch.long, device=initial.device)  # (b, k)
    if image_features is not None and length < image_length:
        gate = [0.0] * batch
    else:
        gate = [1.0 if not any(fillers) or count else 0.0 for count in fillers]
    return OfficialPlan(
        image_features=image_features,
        image_positions=image_positions,
        text_features=initial.gather(1, text_positions[..., None].expand(-1, -1, initial.shape[2])),
        text_positions=text_positions,
        text_mask=_text_mask(real, text_positions.shape[1], fillers),
        image_gate=initial.new_tensor(gate)[:, None, None],
    )


class LowRank(nn.Module):
    """`x W_a W_b` with W_a (h, r) Gaussian and W_b (r, h) zero at first: (..., h) -> (..., h)."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=False)
        nn.init.normal_(self.down.weight, std=rank**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both matrices."""
        return self.up(self.down(x))


class OfficialLearner(nn.Module):
    """One learner: queries from the layer's state, keys and values from initial features.

    With `q = x + LR_q(x)`, `k = f + LR_k(f)`, `v = f + LR_v(f)` the output is
    `LR_o(softmax(rot(q) rot(k)^T / sqrt(d) + mask) v)`; full heads, also where the base groups its
    keys, and rotary positions without the base's scaling.
    """

    def __init__(self, hidden_size: int, rank: int, heads: int, theta: float) -> None:
        super().__init__()
        self.heads, self.theta = heads, theta
        self.query = LowRank(hidden_size, rank)
        self.key = LowRank(hidden_size, rank)
        self.value = LowRank(hidden_size, rank)
        self.output = LowRank(hidden_size, rank)

    def forward(
        self, hidden: Tensor, features: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The learner's output.

        Args:
            hidden: (b, s, h) the layer's state; queries stand at positions 0 .. s-1.
            features: (b, k, h) initial features.
            positions: (b, k) their positions.
            mask: (b, 1, s, k) added to the scores, or None.

        Returns:
            (b, s, h)
        """
        index = torch.arange(hidden.shape[1], device=hidden.device)[None]  # (1, s)
        query = self._rotate(self._heads(hidden + self.query(hidden)), index)  # (b, n, s, d)
        key = self._rotate(self._heads(features + self.key(features)), positions)  # (b, n, k, d)
        value = self._heads(features + self.value(features))
        scores = (query @ key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + mask  # (b, n, s, k)
        mixed = scores.softmax(-1).to(value.dtype) @ value
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        steps = torch.arange(half, dtype=torch.float32, device=x.device) / half
        angle = positions.float()[:, None, :, None] * self.theta**-steps  # (b, 1, s, d/2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class OfficialLearners(nn.Module):
    """The learners and the router of one layer.

    Args:
        hidden_size: h of the base.
        rank: r of the low-rank matrices.
        heads: the base's attention heads; d = h / heads.
        theta: the base's rotary frequency; its scaling is not used.
        learners: which of `visual` and `textual` run.
        router: whether there is a router (stage 2); it is needed with both learners.

    Raises:
        UsageError: when `heads` does not divide `hidden_size`, or two learners have no router.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        heads: int,
        theta: float,
        learners: Sequence[str] = ("visual", "textual"),
        router: bool = True,
    ) -> None:
        super().__init__()
        if hidden_size % heads:
            raise UsageError(
                f"Wings `variant: official` needs heads that divide the hidden size, and "
                f"{heads} does not divide {hidden_size}; use `variant: paper`"
            )
        if len(learners) == 2 and not router:
            raise UsageError("two Wings learners need a router; set `router: true`")

        def learner(kind: str) -> OfficialLearner | None:
            return OfficialLearner(hidden_size, rank, heads, theta) if kind in learners else None

        self.visual = learner("visual")
        self.textual = learner("textual")
        self.router = nn.Linear(ROUTER_WIDTH, 2) if router else None
        if self.router is not None:
            nn.init.zeros_(self.router.weight)
            nn.init.zeros_(self.router.bias)

    def router_scores(self, attention: Tensor) -> Tensor:
        """`sum over heads of A W^T`, without the bias: (b, n, s, s) -> (b, s, 2)."""
        if self.router is None:
            raise UsageError("this layer has no router; only a stage-2 checkpoint has one")
        return attention.sum(1) @ self.router.weight[:, : attention.shape[-1]].T.to(attention.dtype)

    def forward(
        self,
        hidden: Tensor,
        plan: OfficialPlan,
        attention: Tensor | None = None,
        router_scores: Tensor | None = None,
    ) -> Tensor:
        """What is added to `hidden` before the layer's second norm.

        Args:
            hidden: (b, s, h) residual plus attention output, not normalised.
            plan: from `plan_official`.
            attention: (b, n, s, s) the base attention's probabilities.
            router_scores: (b, s, 2) instead of `attention`: what `router_scores` gives, for a
                caller that has the sum over heads of `A W^T` without the weights themselves.

        Returns:
            (b, s, h). Both learners are weighted by `softmax(SiLU(scores + bias))` and added twice;
            a learner that runs alone is added once with weight 1; no learner adds 0.

        Raises:
            UsageError: when both learners run and neither `attention` nor `router_scores` is given.
        """
        visual = textual = None
        if self.visual is not None and plan.image_features is not None:
            assert plan.image_positions is not None
            visual = self.visual(hidden, plan.image_features, plan.image_positions, None)
        if self.textual is not None:
            textual = self.textual(hidden, plan.text_features, plan.text_positions, plan.text_mask)
        if visual is None or textual is None:
            alone = visual if visual is not None else textual
            return torch.zeros_like(hidden) if alone is None else alone
        if router_scores is None:
            if attention is None:
                raise UsageError(
                    "Wings `variant: official` needs the base's attention weights; "
                    'load the base with attn_implementation="eager"'
                )
            router_scores = self.router_scores(attention)
        assert self.router is not None
        share = functional.silu(router_scores + self.router.bias.to(router_scores.dtype))
        share = share.softmax(-1).to(hidden.dtype)  # (b, s, 2)
        visual, textual = share[..., :1] * visual, share[..., 1:] * textual
        return (1 + plan.image_gate) * visual + 2 * textual


def _image_starts(real: Tensor, kinds: Tensor | None) -> tuple[list[int], int]:
    """Index of the image in each row, 0 for a row without; and an image's length, 0 for none."""
    if kinds is None:
        return [0] * real.shape[0], 0
    image = (kinds == 1) & real  # (b, s)
    counts = image.sum(1)
    starts = image.long().argmax(1)
    last = image.shape[1] - 1 - image.flip(1).long().argmax(1)
    together = (last - starts + 1 == counts) | (counts == 0)
    if not together.all() or counts[counts > 0].unique().numel() > 1:
        raise UsageError(
            "Wings `variant: official` takes one image a row; give one, or use `variant: paper`"
        )
    return starts.tolist(), int(counts.max())


def _cut_images(initial: Tensor, kinds: Tensor | None, image_length: int) -> Tensor:
    """(b, p, h) the rows' image features, from the embeddings."""
    assert kinds is not None
    image = kinds == 1
    if not image.any(1).all():
        raise UsageError(
            "Wings `variant: official` takes no batch in which some rows have an image and some "
            "none; run them apart, or give the rows without one a dummy image"
        )
    return initial[image].view(initial.shape[0], image_length, -1)


def _text_keys(
    starts: list[int], length: int, image_length: int, system_length: int
) -> tuple[list[list[int]], list[int]]:
    """The textual keys' positions, filled up to one length, and how many of each row are fillers.

    A row whose image starts at 0, like one that has none, uses every position.
    """
    keys = [
        [*range(system_length, start), *range(start + image_length, length)]
        if start
        else list(range(length))
        for start in starts
    ]
    longest = max(len(each) for each in keys)
    fillers = [longest - len(each) for each in keys]
    if any(not each and count for each, count in zip(keys, fillers, strict=True)):
        raise UsageError(
            "Wings `variant: official` cannot batch a row without text after its system prompt "
            "with others; run it by itself"
        )
    filled = [each + each[-1:] * count for each, count in zip(keys, fillers, strict=True)]
    return filled, fillers


def _text_mask(real: Tensor, count: int, fillers: list[int]) -> Tensor:
    """(b, 1, s, k) the main causal and padding mask, cut to its first k columns.

    Column j is the j-th key of the list and not position j: this is the published code's leak. The
    last queries of a row with fillers, as many as those, see every key alike.
    """
    batch, length = real.shape
    lowest = torch.finfo(torch.float32).min
    index = torch.arange(length, device=real.device)
    seen = (index[None, :] <= index[:, None]) & real[:, None, :]  # (b, s, s)
    mask = torch.zeros(batch, 1, length, count, device=real.device)
    mask.masked_fill_(~seen[:, None, :, :count], lowest)
    for row, fill in enumerate(fillers):
        if fill:
            mask[row, :, -fill:] = lowest
    return mask
