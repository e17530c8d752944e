"""Wings as the published code computes it (method ``wings-official``), defects included.

It exists to load published checkpoints with equal logits, and promises none of the invariants that
the paper's form keeps: later tokens change earlier outputs, rows of one batch change each other,
nothing can be cached. Source: the published implementation of arXiv 2406.03496, as described by
what it computes; docs/methods.md says how it departs from the paper.

What all layers share is computed once for each forward as an ``OfficialPlan``:

    plan = plan_official(features, kinds, image_features, system_length=14)
    hidden = hidden + learners(hidden, plan, router_scores=scores)   # in every layer

where ``hidden`` is the residual plus the attention's output, before the layer's second norm.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.grafts.base import IMAGE, PADDING
from mmgraft.grafts.wings.learners import Learner, Rotation

#: Columns of the published router: a longer row has no weights.
ROUTER_WIDTH = 4096


class OfficialPlan(Frozen):
    """Inputs of the learners of every layer in one forward.

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
    features: Tensor,
    kinds: Tensor,
    image_features: Tensor | None,
    system_length: int,
    max_length: int | None = ROUTER_WIDTH,
) -> OfficialPlan:
    """Lay out the learners' keys for one right-padded batch.

    Args:
        features: (b, s, h) input embeddings with the projected image features in place.
        kinds: (b, s) PADDING, TEXT or IMAGE; at most one image a row.
        image_features: (b, p, h) projected features, one image for each row, a dummy one for a row
            without an image. None takes them from ``features`` when every row has an image, and
            leaves the visual learner out when no row has one.
        system_length: Tokens of the system prompt, which are no keys of the textual learner.
        max_length: Columns of the router; None where there is no router.

    Raises:
        UsageError: For left padding, for several images in a row, for a batch in which only some
            rows have an image and ``image_features`` is None, and for a row longer than the router.
    """
    length = features.shape[1]
    real = _real(kinds, max_length)
    features = features * real[..., None].to(features.dtype)
    starts, image_length = _image_starts(kinds)
    if image_features is None and image_length:
        image_features = _cut_images(features, kinds, image_length)
    image_positions = None
    if image_features is not None:
        image_length = image_features.shape[1]
        image_features = image_features[:, :length]
        offsets = torch.arange(image_features.shape[1], device=features.device)
        image_positions = torch.tensor(starts, device=features.device)[:, None] + offsets  # (b, p)
    positions, fillers = _text_keys(starts, length, image_length, system_length)
    text_positions = torch.tensor(positions, dtype=torch.long, device=features.device)  # (b, k)
    gate = [float(length >= image_length and (not any(fillers) or n > 0)) for n in fillers]
    index = text_positions[..., None].expand(-1, -1, features.shape[2])  # (b, k, h)
    return OfficialPlan(
        image_features=image_features,
        image_positions=image_positions,
        text_features=features.gather(1, index),
        text_positions=text_positions,
        text_mask=_text_mask(real, text_positions.shape[1], fillers),
        image_gate=features.new_tensor(gate)[:, None, None],
    )


def _real(kinds: Tensor, max_length: int | None) -> Tensor:
    """Return True at positions that are no padding ``(b, s)``; refuse rows that cannot run."""
    length = kinds.shape[1]
    if max_length is not None and length > max_length:
        raise UsageError(
            f"the row has {length} positions and the published Wings router {max_length} columns; "
            f"shorten the prompt to {max_length} positions, image tokens counted"
        )
    real = kinds != PADDING
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise UsageError(
            "wings-official takes right-padded batches only; "
            'set padding_side="right", or run the rows one by one'
        )
    return real


class OfficialLearners(nn.Module):
    """The learners and the router of one layer.

    Learners use full heads, also where the base groups its keys, and the base's rotary frequency
    without its scaling.

    Args:
        hidden_size: H of the base.
        rank: R of the low-rank matrices.
        heads: The base's attention heads; d = h / heads.
        theta: The base's rotary frequency.
        learners: Which of ``visual`` and ``textual`` run.
        router: Whether there is a router (stage 2); it is needed with both learners.
        router_width: Columns of the router.

    Raises:
        UsageError: When ``heads`` does not divide ``hidden_size``.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        heads: int,
        theta: float,
        learners: Sequence[str] = ("visual", "textual"),
        router: bool = True,
        router_width: int = ROUTER_WIDTH,
    ) -> None:
        super().__init__()
        if hidden_size % heads:
            raise UsageError(
                f"wings-official needs heads that divide the hidden size, and "
                f"{heads} does not divide {hidden_size}; graft with --method wings"
            )
        self.theta = theta

        def learner(kind: str) -> Learner | None:
            return Learner(hidden_size, rank, heads) if kind in learners else None

        self.visual = learner("visual")
        self.textual = learner("textual")
        self.router = nn.Linear(router_width, 2) if router else None
        if self.router is not None:
            nn.init.zeros_(self.router.weight)
            nn.init.zeros_(self.router.bias)

    def forward(
        self, hidden: Tensor, plan: OfficialPlan, router_scores: Tensor | None = None
    ) -> Tensor:
        """Return what is added to ``hidden`` before the layer's second norm.

        Args:
            hidden: (b, s, h) residual plus attention output, not normalised.
            plan: From ``plan_official``.
            router_scores: (b, s, 2) ``sum over heads of A W^T`` of the base attention's
                probabilities ``A``, without the bias; None where no two learners run.

        Returns:
            (b, s, h). Both learners are weighted by ``softmax(SiLU(scores + bias))`` and added
            twice; a learner that runs alone is added once with weight 1; no learner adds 0.
        """
        visual = textual = None
        if self.visual is not None and plan.image_features is not None:
            assert plan.image_positions is not None
            visual = self._attend(self.visual, hidden, plan.image_features, plan.image_positions)
        if self.textual is not None:
            textual = self._attend(
                self.textual, hidden, plan.text_features, plan.text_positions, plan.text_mask
            )
        if visual is None or textual is None:
            alone = visual if visual is not None else textual
            return torch.zeros_like(hidden) if alone is None else alone
        assert self.router is not None
        assert router_scores is not None
        share = F.silu(router_scores + self.router.bias.to(router_scores.dtype))
        share = share.softmax(-1).to(hidden.dtype)  # (b, s, 2)
        visual, textual = share[..., :1] * visual, share[..., 1:] * textual
        return (1 + plan.image_gate) * visual + 2 * textual

    def _attend(
        self,
        learner: Learner,
        hidden: Tensor,
        features: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One learner's output, (b, s, h).

        Queries are the layer's state at positions 0 .. s-1, keys and values the features (b, k, h)
        at their positions (b, k); mask (b, 1, s, k) is added to the scores.
        """
        size = hidden.shape[-1] // learner.heads
        index = torch.arange(hidden.shape[1], device=hidden.device)[None]  # (1, s)
        query = learner.queries(hidden, Rotation(index, size, self.theta))
        rotation = Rotation(positions, size, self.theta)
        key, value = learner.keys_values(features, rotation)  # (b, n, k, d)
        scores = (query @ key.transpose(2, 3)).float() * size**-0.5  # (b, n, s, k)
        if mask is not None:
            scores = scores + mask
        mixed = scores.softmax(-1).to(value.dtype) @ value  # (b, n, s, d)
        return learner.output(mixed.transpose(1, 2).flatten(2))


def _image_starts(kinds: Tensor) -> tuple[list[int], int]:
    """Index of the image in each row, 0 for a row without; and an image's length, 0 for none."""
    image = kinds == IMAGE  # (b, s)
    counts = image.sum(1)
    starts = image.long().argmax(1)
    last = image.shape[1] - 1 - image.flip(1).long().argmax(1)
    together = (last - starts + 1 == counts) | (counts == 0)
    if not together.all() or counts[counts > 0].unique().numel() > 1:
        raise UsageError(
            "wings-official takes one image a row; give one, or graft with --method wings"
        )
    return starts.tolist(), int(counts.max())


def _cut_images(features: Tensor, kinds: Tensor, image_length: int) -> Tensor:
    """(b, p, h) the rows' image features, from the embeddings."""
    image = kinds == IMAGE
    if not image.any(1).all():
        raise UsageError(
            "wings-official takes no batch in which some rows have an image and some "
            "none; run them apart, or give the rows without one a dummy image"
        )
    return features[image].view(features.shape[0], image_length, -1)


def _text_keys(
    starts: list[int], length: int, image_length: int, system_length: int
) -> tuple[list[list[int]], list[int]]:
    """Return the textual keys' positions, filled up to one length, and how many of each row are
    fillers.

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
            "wings-official cannot batch a row without text after its system prompt "
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
