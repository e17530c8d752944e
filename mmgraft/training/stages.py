"""One stage of a recipe on a model: what trains, at which rate, through which path."""

from torch import nn

from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.grafts.registry import get_method
from mmgraft.model.modeling import GraftedModel
from mmgraft.recipes.recipe import Stage


class RateGroup(Frozen):
    """Parameters that share a learning rate."""

    name: str
    lr: float
    parameters: dict[str, nn.Parameter]

    @property
    def size(self) -> int:
        """Numbers in all parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def open_stage(model: GraftedModel, stage: Stage) -> list[RateGroup]:
    """Set the model's path, freeze and thaw its parameters, and sort these by learning rate.

    Args:
        model: The grafted model; its trained parameters become fp32.
        stage: Of a resolved recipe.

    Raises:
        UsageError: A group that this graft does not have, or a switch that it cannot follow.
    """
    graft = model.workflow(stage.workflow).graft
    graft.set_state({"active": stage.graft_active})
    try:
        graft.switch(stage)
    except UsageError as error:
        raise UsageError(f"stage {stage.name!r} {error}") from None
    model.set_trainable(stage.train, stage.workflow)
    return rate_groups(model, stage)


def rate_groups(model: GraftedModel, stage: Stage) -> list[RateGroup]:
    """Sort every trained parameter under the rate of the smallest named group that holds it."""
    known = model.groups(stage.workflow)
    given = stage.lr if isinstance(stage.lr, dict) else {}
    rates = {**get_method(model.workflow(stage.workflow).record.method).rates, **given}
    default = stage.lr if isinstance(stage.lr, float) else rates.get("default")
    named = [name for name in rates if name != "default"]
    members = {
        name: {id(parameter) for parameter in known.get(name, [])}
        for name in {*named, *stage.train}
    }
    by_size = sorted(members, key=lambda name: (len(members[name]), name not in named, name))
    found: dict[str, RateGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        holding = [group for group in by_size if id(parameter) in members[group]]
        rated = [group for group in holding if group in rates]
        group = rated[0] if rated else holding[0]
        lr = rates.get(group, default)
        if lr is None:
            raise UsageError(f"stage {stage.name!r}: lr names no rate for {group}; add one")
        found.setdefault(group, RateGroup(group, lr, {})).parameters[name] = parameter
    if not found:
        raise UsageError(
            f"stage {stage.name!r} trains {', '.join(stage.train)}, but this graft has no such "
            f"parameters; it has {', '.join(name for name, p in known.items() if p)}"
        )
    return list(found.values())
