"""One stage of a recipe on a model: what trains, at which rate, through which path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from mmgraft.errors import UsageError
from mmgraft.recipes.recipe import Stage

if TYPE_CHECKING:
    from mmgraft.model.modeling import GraftedModel

_PARTS_OF = {"learners": ("learners.visual", "learners.textual")}


@dataclass(frozen=True)
class RateGroup:
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
        UsageError: A group or a learner that this graft does not have.
    """
    set_path(model, stage)
    known = model.groups(stage.workflow)
    names = [part for group in stage.train for part in _parts(group, known)]
    model.set_trainable(names, stage.workflow)
    return rate_groups(model, stage)


def set_path(model: GraftedModel, stage: Stage) -> None:
    """Put the graft, or the learners that the stage names, into the path of its workflow."""
    graft = model.workflow(stage.workflow).graft
    state: dict[str, object] = {"active": stage.graft_active}
    if stage.learners is not None:
        state["learners"] = list(stage.learners)
    elif "learners" in graft.state():
        state["learners"] = list(getattr(graft.config, "learners", ()))
    graft.set_state({**graft.state(), **state})
    if stage.router is None or "learners" not in graft.state():
        return
    both = len(graft.state()["learners"]) == 2
    has_router = "router" in graft.groups()
    if stage.router and not (both and has_router):
        raise UsageError(
            f"stage {stage.name!r} has router: true, but "
            + ("one learner has nothing to weigh" if not both else "this graft has no router")
            + "; write router: false"
        )
    if not stage.router and both and has_router:
        raise UsageError(
            f"stage {stage.name!r} has router: false, but this graft's router weighs its two "
            "learners; write router: true, or learners: [visual]"
        )


def rate_groups(model: GraftedModel, stage: Stage) -> list[RateGroup]:
    """Put every trained parameter under the rate of the smallest named group that holds it."""
    known = model.groups(stage.workflow)
    rates = stage.lr if isinstance(stage.lr, dict) else {}
    default = stage.lr if isinstance(stage.lr, float) else rates.get("default")
    named = [name for name in rates if name != "default"]
    members = {name: _ids(known, _parts(name, known)) for name in {*named, *stage.train}}
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


def _parts(group: str, known: dict[str, list[nn.Parameter]]) -> list[str]:
    if group in known or group not in _PARTS_OF:
        return [group]
    return [part for part in _PARTS_OF[group] if part in known] or [group]


def _ids(known: dict[str, list[nn.Parameter]], names: Iterable[str]) -> set[int]:
    return {id(parameter) for name in names for parameter in known.get(name, [])}
