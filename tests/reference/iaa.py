"""IAA, slowly: inserted layers called one after the other, no hooks, no cache.

`iaa_reference` is the three structures over any layer functions; `published_iaa` is the model
that the published code computes (structure `c` on Llama), on the checkpoint's own tensor names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.decoder import (
    State,
    causal_mask,
    clip_features,
    decoder_layer,
    project,
    rms_norm,
)
from reference.golden import IMAGE_ID, TOWER

Layer = Callable[[Tensor], Tensor]

# The published names of what each task owns: (embedding, layers, norm, head, projector).
PUBLISHED_NAMES = {
    "Text": ("model.embed_tokens", "", "model.norm", "lm_head", ""),
    "MM": (
        "model.embed_tokens_condition",
        "model.condition_layers",
        "model.norm_condition",
        "lm_head_condtion",
        "model.mm_projector",
    ),
    "G": (
        "model.embed_tokens_condition_grounding",
        "model.condition_layers_grounding",
        "model.norm_condition_grounding",
        "lm_head_condtion_grounding",
        "model.mm_projector_G",
    ),
}


def iaa_reference(
    base_layers: Sequence[Layer],
    inserted: Mapping[int, Layer],
    gates: Mapping[int, Layer],
    structure: str,
    x: Tensor,
) -> list[Tensor]:
    """The hidden states of a base with inserted layers.

    Args:
        base_layers: the base's layers phi_i.
        inserted: base layer index i -> inserted layer phi'_k that follows it.
        gates: base layer index i -> gate G_k (structures `a` and `b`).
        structure: `a`, `b` or `c`.
        x: the state that enters the first layer.

    Returns:
        [x, X^1, ..., X^L], each after the graft.
    """
    states = [x]
    carried = torch.zeros_like(x)  # c_{-1}
    for i, phi in enumerate(base_layers):
        entering = states[-1]
        leaving = phi(entering)
        if i in inserted and structure == "c":
            leaving = inserted[i](leaving)
        elif i in inserted and structure == "b":
            leaving = leaving + gates[i](inserted[i](leaving))
        elif i in inserted and structure == "a":
            carried = inserted[i](carried + entering)
            leaving = leaving + gates[i](carried)
        states.append(leaving)
    return states


@dataclass(frozen=True)
class IAAOutput:
    """One row's results: vision_features (images, P, v), image_features (images, P, h), ...

    hidden_states is (layers + 1, s, h), the last after the final norm; logits is (s, vocab).
    """

    vision_features: Tensor | None
    image_features: Tensor | None
    hidden_states: Tensor
    logits: Tensor


def published_iaa(
    state: State,
    config: Mapping,
    vision_config: Mapping,
    task: str,
    ids: Sequence[int],
    images: Sequence[Tensor],
) -> IAAOutput:
    """One unpadded row through the published IAA model.

    Args:
        state: the checkpoint.
        config: its config, with `ehce_layers`.
        vision_config: its tower's config.
        task: `Text`, `MM` or `G`.
        ids: token ids, -200 where an image stands.
        images: pixel values (3, H, W), one for each -200 in order.
    """
    embedding, layers, norm, head, projector = PUBLISHED_NAMES[task]
    pending, pieces, seen_features, projected = list(images), [], [], []
    for token in ids:
        if token == IMAGE_ID:
            seen_features.append(
                clip_features(
                    state, TOWER, vision_config, pending.pop(0), config["mm_vision_select_layer"]
                )
            )
            projected.append(project(state, projector, seen_features[-1]))
            pieces.append(projected[-1])
        else:
            pieces.append(state[f"{embedding}.weight"][token][None])
    x = torch.cat(pieces)  # (s, h)
    mask = causal_mask(x.shape[0])

    def layer(prefix: str) -> Layer:
        return lambda hidden: decoder_layer(state, prefix, hidden, config, mask)

    after = config["ehce_layers"] if layers else []
    states = iaa_reference(
        base_layers=[layer(f"model.layers.{i}") for i in range(config["num_hidden_layers"])],
        inserted={i: layer(f"{layers}.{k}") for k, i in enumerate(after)},
        gates={},
        structure="c",
        x=x,
    )
    states[-1] = rms_norm(states[-1], state[f"{norm}.weight"], config["rms_norm_eps"])
    return IAAOutput(
        vision_features=torch.stack(seen_features) if seen_features else None,
        image_features=torch.stack(projected) if projected else None,
        hidden_states=torch.stack(states),
        logits=states[-1] @ state[f"{head}.weight"].T,
    )
