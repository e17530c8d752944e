"""Shallow copies of modules whose parts are replaced by stand-ins, to see what the code does.

The copy runs the real ``forward`` of the module's class on a few numbers on the CPU, while every
child is a stand-in without weights. So it works alike for a real model of any size, a quantised
one and a skeleton on the meta device, and the original is never touched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class StandIn(nn.Module):
    """Calls ``answer(name, args, kwargs)`` in place of the child called ``name``.

    What else is asked of it, such as a weight whose dtype is looked at, is the child's.
    """

    def __init__(
        self, name: str, answer: Callable[[str, tuple, dict], Any], child: nn.Module
    ) -> None:
        super().__init__()
        self.__dict__.update(_name=name, _answer=answer, _child=child)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_child"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand the call on."""
        return self._answer(self._name, args, kwargs)


def with_stand_ins(
    module: nn.Module,
    answer: Callable[[str, tuple, dict], Any],
    opened: tuple[str, ...] = (),
    prefix: str = "",
    seed: int = 0,
) -> nn.Module:
    """Copy ``module`` with stand-ins for its children.

    Args:
        module: What to copy; it is not changed.
        answer: What the stand-ins return, given the child's dotted name and the call's arguments.
        opened: Dotted names of descendants; the modules on the way to them are copied in the same
            manner instead of being replaced.
        prefix: Dotted name of ``module`` itself, with a dot at its end.
        seed: The module's own parameters (not its children's) become random numbers drawn with it.
    """
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)  # accelerate's hooks replace it on the instance
    generator = torch.Generator().manual_seed(seed)
    twin._parameters = {
        name: None
        if parameter is None
        else nn.Parameter(
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64),
            requires_grad=False,
        )
        for name, parameter in module._parameters.items()
    }
    twin._modules = {}
    for name, child in module._modules.items():
        path = prefix + name
        if child is None:
            twin._modules[name] = None
        elif any(goal.startswith(path + ".") for goal in opened):
            twin._modules[name] = with_stand_ins(child, answer, opened, path + ".", seed)
        else:
            twin._modules[name] = StandIn(path, answer, child)
    twin.training = False
    return twin


def first_argument(args: tuple, kwargs: dict) -> torch.Tensor:
    """Return the first tensor of a call, positional or by name."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    raise TypeError("called without a tensor")


def required_as_none(module: nn.Module) -> dict[str, None]:
    """Return None for every required argument of ``forward`` but the first."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    return {
        p.name: None
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def snapped(value: float, tolerance: float) -> float:
    """Round to six digits where that takes off no more than the noise of measuring."""
    short = float(f"{value:.6g}")
    return short if abs(short - value) <= tolerance * abs(value) else value
