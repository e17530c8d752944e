"""The published Wings code's computation (`variant: official`), slowly and with its defects."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from reference.decoder import (
    State,
    causal_mask,
    clip_features,
    linear,
    merge_heads,
    mlp,
    project,
    rms_norm,
    rotate,
    self_attention,
    split_heads,
)
from reference.golden import IMAGE_ID, TOWER


@dataclass
class WingsOutput:
    """A batch's results; `learners` maps "attn_pool.0" and the like to (b, s, ...)."""

    image_features: Tensor | None
    hidden_states: Tensor  # (layers + 1, b, s, h), the last after the final norm
    logits: Tensor  # (b, s, vocab)
    learners: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LearnerKeys:
    """Keys of a row's learners: features (k, h) and their positions (k,)."""

    features: Tensor
    positions: Tensor


def learner(
    state: State,
    prefix: str,
    hidden: Tensor,
    keys: LearnerKeys,
    heads: int,
    theta: float,
    mask: Tensor | None,
) -> Tensor:
    """One learner on one row: (s, h) -> (s, h). `mask` (s, k) is added to the scores."""

    def low_rank(name: str, x: Tensor) -> Tensor:
        return linear(state, f"{prefix}.{name}_proj.1", linear(state, f"{prefix}.{name}_proj.0", x))

    query = split_heads(hidden + low_rank("q", hidden), heads)
    key = split_heads(keys.features + low_rank("k", keys.features), heads)
    value = split_heads(keys.features + low_rank("v", keys.features), heads)
    query = rotate(query, torch.arange(hidden.shape[0]), theta)
    key = rotate(key, keys.positions, theta)
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores + mask
    return low_rank("o", merge_heads(scores.softmax(-1) @ value))


def text_key_lists(
    starts: Sequence[int], length: int, image_length: int, system_length: int
) -> tuple[list[list[int]], list[int] | None]:
    """The text key positions of every row and the fillers' counts (None when none are needed)."""
    lists = []
    for start in starts:
        if start == 0:
            lists.append(list(range(length)))
        else:
            before = list(range(system_length, start))
            lists.append(before + list(range(start + image_length, length)))
    longest = max(len(keys) for keys in lists)
    if all(len(keys) == longest for keys in lists):
        return lists, None
    fillers = [longest - len(keys) for keys in lists]
    return [keys + keys[-1:] * n for keys, n in zip(lists, fillers, strict=True)], fillers


def published_wings(
    state: State,
    config: Mapping,
    vision_config: Mapping,
    ids: Tensor,
    attention_mask: Tensor | None,
    images: Tensor | None,
) -> WingsOutput:
    """A right-padded batch through the published Wings model.

    Args:
        state: the checkpoint.
        config: its config, with the graft's settings.
        vision_config: its tower's config.
        ids: (b, n) token ids, at most one -200 in a row.
        attention_mask: (b, n), 1 for real tokens.
        images: (b, 3, H, W), one for each row (a dummy for a row without image), or None.
    """
    rows, lowest = ids.shape[0], torch.finfo(torch.float32).min
    image_length = config["image_token_length"]
    features = None  # (b, P, h)
    if images is not None:
        layer = config["mm_vision_select_layer"]
        towers = [clip_features(state, TOWER, vision_config, image, layer) for image in images]
        features = torch.stack([project(state, "model.mm_projector", each) for each in towers])

    # 1. expanded embeddings, zero vectors on the right
    expanded, starts = [], []
    for r in range(rows):
        tokens = ids[r] if attention_mask is None else ids[r][attention_mask[r].bool()]
        pieces, start = [], 0
        for token in tokens.tolist():
            if token == IMAGE_ID and features is not None:
                start = sum(len(piece) for piece in pieces)
                pieces.append(features[r])
            else:
                pieces.append(state["model.embed_tokens.weight"][token][None])
        expanded.append(torch.cat(pieces))
        starts.append(start)
    real = [len(row) for row in expanded]
    length = max(real)
    embeddings = torch.stack(
        [functional.pad(row, (0, 0, 0, length - len(row))) for row in expanded]
    )  # (b, s, h)

    # 2. and 3. what the learners look at
    key_lists, fillers = text_key_lists(
        starts, length, image_length, config["system_prompt_length"]
    )
    image_keys: list[LearnerKeys] = []
    if features is not None:
        shown = min(image_length, length)
        if length < image_length:
            fillers = [0] * rows
        image_keys = [
            LearnerKeys(features[r, :shown], torch.arange(starts[r], starts[r] + shown))
            for r in range(rows)
        ]
    text_keys = [
        LearnerKeys(embeddings[r, keys], torch.tensor(keys, dtype=torch.long))
        for r, keys in enumerate(key_lists)
    ]

    # 4. the layers
    stage_two = config["wings_router_type"] == "linear"
    heads, theta, eps = config["num_attention_heads"], config["rope_theta"], config["rms_norm_eps"]
    states, recorded = [embeddings], {}
    for i in range(config["num_hidden_layers"]):
        prefix, results, notes = f"model.layers.{i}", [], {}
        for r in range(rows):
            x, seen = states[-1][r], causal_mask(length, real[r])
            normed = rms_norm(x, state[f"{prefix}.input_layernorm.weight"], eps)
            output, weights = self_attention(state, f"{prefix}.self_attn", normed, config, seen)
            hidden = x + output
            image = text = None
            if image_keys:
                image = learner(
                    state, f"{prefix}.attn_pool", hidden, image_keys[r], heads, theta, None
                )
                notes.setdefault("attn_pool", []).append(image)
            if stage_two:
                mask = torch.zeros(length, length).masked_fill(~seen, lowest)
                mask = mask[:, : len(key_lists[r])].clone()  # list index, not true position
                if fillers is not None and fillers[r] > 0:
                    mask[-fillers[r] :] = lowest
                text = learner(
                    state, f"{prefix}.attn_t_pool", hidden, text_keys[r], heads, theta, mask
                )
                notes.setdefault("attn_t_pool", []).append(text)
            if image is not None and text is not None:
                router = state[f"{prefix}.reweight_module.linear.weight"][:, :length]
                bias = state[f"{prefix}.reweight_module.linear.bias"]
                share = functional.silu(weights.sum(0) @ router.T + bias).softmax(-1)  # (s, 2)
                notes.setdefault("reweight_module", []).append(share)
                gate = 1 if fillers is None else int(fillers[r] != 0)
                hidden = hidden + share[:, :1] * image * gate + share[:, 1:] * text
                hidden = hidden + share[:, :1] * image + share[:, 1:] * text  # and again
            elif image is not None:
                hidden = hidden + image
            elif text is not None:
                hidden = hidden + text
            normed = rms_norm(hidden, state[f"{prefix}.post_attention_layernorm.weight"], eps)
            results.append(hidden + mlp(state, f"{prefix}.mlp", normed))
        states.append(torch.stack(results))
        recorded.update({f"{name}.{i}": torch.stack(each) for name, each in notes.items()})
    states[-1] = rms_norm(states[-1], state["model.norm.weight"], eps)
    return WingsOutput(
        image_features=features,
        hidden_states=torch.stack(states),
        logits=states[-1] @ state["lm_head.weight"].T,
        learners=recorded,
    )
