"""Wings as in its paper (`variant: paper`), slowly: one layer, one row, explicit weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.decoder import merge_heads, rotate, split_heads

TEXT, IMAGE = 0, 1


@dataclass(frozen=True)
class LearnerWeights:
    """A learner's low-rank matrices, as nn.Linear has them: `*_down` (r, h) and `*_up` (h, r)."""

    query_down: Tensor
    query_up: Tensor
    key_down: Tensor
    key_up: Tensor
    value_down: Tensor
    value_up: Tensor
    output_down: Tensor
    output_up: Tensor


def low_rank(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """`x W_a W_b`: (s, h) -> (s, h)."""
    return x @ down.T @ up.T


def learner_reference(
    x: Tensor,
    init_features: Tensor,
    is_key: Tensor,
    positions: Tensor,
    weights: LearnerWeights,
    heads: int,
    theta: float | None,
) -> Tensor:
    """One learner on one row, query by query and head by head.

    Args:
        x: (s, h) the state that enters the layer.
        init_features: (s, h) the initial features.
        is_key: (s,) booleans, the tokens of the learner's own kind.
        positions: (s,) the tokens' positions in the row.
        weights: the learner's matrices.
        heads: the learner's heads; d = h / heads.
        theta: the base's rotary frequency; `None` for none.

    Returns:
        (s, h); exactly zero where a query sees no key.
    """
    length, hidden = x.shape
    width = hidden // heads
    query = x + low_rank(x, weights.query_down, weights.query_up)
    key = init_features + low_rank(init_features, weights.key_down, weights.key_up)
    value = init_features + low_rank(init_features, weights.value_down, weights.value_up)
    query = rotate(split_heads(query, heads), positions, theta)  # (n, s, d)
    key = rotate(split_heads(key, heads), positions, theta)
    value = split_heads(value, heads)
    rows = []
    for q in range(length):
        seen = is_key & (positions <= positions[q])  # (s,)
        if not seen.any():
            rows.append(torch.zeros(heads, width, dtype=x.dtype))
            continue
        picked = []
        for head in range(heads):
            scores = key[head, seen] @ query[head, q] / math.sqrt(width)
            picked.append(scores.softmax(0) @ value[head, seen])
        rows.append(torch.stack(picked))
    mixed = merge_heads(torch.stack(rows, dim=1))  # (s, h)
    return low_rank(mixed, weights.output_down, weights.output_up)


def router_reference(attn_weights: Tensor, positions: Tensor, router: Tensor) -> Tensor:
    """The two learners' shares for every query.

    Args:
        attn_weights: (n, s, s) the main attention's weights, zero where masked.
        positions: (s,) the tokens' positions: key j uses column positions[j] of the router.
        router: (2, s_max); row 0 visual, row 1 textual.

    Returns:
        (s, 2), each row sums to 1.
    """
    length = positions.shape[0]
    logits = torch.zeros(length, 2, dtype=attn_weights.dtype)
    for j in range(length):
        logits += attn_weights[:, :, j].sum(0)[:, None] * router[:, positions[j]]
    return logits.softmax(-1)


def wings_layer_reference(
    x: Tensor,
    init_features: Tensor,
    kinds: Tensor,
    positions: Tensor,
    attn_weights: Tensor | None,
    visual: LearnerWeights | None,
    textual: LearnerWeights | None,
    router: Tensor | None,
    heads: int,
    theta: float | None,
) -> Tensor:
    """Return what Wings adds to a layer's attention output, for one row without padding.

    Args:
        x: (s, h) the state that enters the layer, not normalised.
        init_features: (s, h) text embeddings and projected image features.
        kinds: (s,) 0 text, 1 image.
        positions: (s,) the tokens' own positions.
        attn_weights: (n, s, s) the main attention's weights; needed with both learners.
        visual: the visual learner, or None.
        textual: the textual learner, or None.
        router: (2, s_max), or None; needed with both learners.
        heads: learner heads.
        theta: the base's rotary frequency, unscaled; `None` for none.

    Returns:
        (s, h). With one learner it is added with weight 1.
    """
    outputs = {
        kind: learner_reference(x, init_features, kinds == kind, positions, weights, heads, theta)
        for kind, weights in ((IMAGE, visual), (TEXT, textual))
        if weights is not None
    }
    if len(outputs) < 2:
        return sum(outputs.values(), torch.zeros_like(x))
    if attn_weights is None or router is None:
        raise ValueError("two learners need a router and the main attention's weights")
    shares = router_reference(attn_weights, positions, router)  # (s, 2)
    return shares[:, :1] * outputs[IMAGE] + shares[:, 1:] * outputs[TEXT]
