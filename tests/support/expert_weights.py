"""The experts of a model by the names of the base, and what the slow reference makes of them."""

from __future__ import annotations

from torch import Tensor, nn

from grafting import PATCHES, project
from mmgraft import GraftedModel
from mmgraft.grafts.on_linears import Adapter
from reference.expert import Experts, expert_reference, positions_of


def experts_of(model: GraftedModel) -> dict[str, nn.Module]:
    """The experts by the names that linear layers have in the base."""
    graft = model.workflow().graft
    return {
        f"{model.anatomy.layers_path}.{index}.{name}": part
        for index, parts in graft._modules_at.items()
        for name, part in parts.items()
    }


def weights_of(model: GraftedModel) -> Experts:
    """Weight and bias of each expert, an adapter added to the base's."""
    state, found = model.base.state_dict(), {}
    for name, part in experts_of(model).items():
        if isinstance(part, Adapter):
            weight = state[f"{name}.weight"] + part.up.weight @ part.down.weight
            found[name] = weight, state.get(f"{name}.bias")
        else:
            found[name] = part.weight, part.bias
    return found


def by_hand(model: GraftedModel, inputs: dict[str, Tensor], shared: bool = False) -> Tensor:
    """The logits of the reference for a batch of one row."""
    kinds = inputs["mm_token_type_ids"][0]
    embeds = model.base.get_input_embeddings()(inputs["input_ids"][0]).clone()
    embeds[kinds == 1] = project(model, inputs["image_features"]).flatten(0, 1)
    config = {**model.base.config.to_dict(), "rope_theta": model.anatomy.rope_theta}
    shown = iter(n // PATCHES for n in range(len(kinds)))
    images = [next(shown) if kind else None for kind in kinds.tolist()]
    positions = positions_of(images, shared)
    state = model.base.state_dict()
    return expert_reference(state, weights_of(model), config, embeds, kinds == 1, positions)
