"""The linear layers inside a decoder layer, fused, turned (GPT-2's) and packed ones alike."""

from __future__ import annotations

import inspect
import re
from functools import cache

from torch import nn
from transformers.pytorch_utils import Conv1D

_CALLED = re.compile(r"self\.(\w+)\(")


def leaf_linears(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """Find the linear layers that are given each position of a row by itself, in its place.

    Of a part that holds experts only the shared ones are found: the others are stacked tensors, or
    are called with the tokens of all rows sorted by expert, and a router is no part of the
    network's width. Left out too is what makes keys and values of what a cache holds: it is given
    all positions so far.

    Args:
        layer: A decoder layer, on any device, quantised or not.

    Returns:
        The widths of what goes in and comes out, by dotted name.
    """
    routed: set[nn.Module] = set()
    for part in filter(_holds_experts, layer.children()):
        shared = [
            m for name, one in part.named_children() if "shared" in name for m in _network(one)
        ]
        routed |= {*part.modules()} - {*shared}
    modules = {name: part for name, part in layer.named_modules() if part not in routed}
    for name, part in list(modules.items()):
        for member in _of_cached(type(part)):
            modules.pop(f"{name}.{member}", None)
    sizes = {name: _sizes(part) for name, part in modules.items()}
    return {name: size for name, size in sizes.items() if size is not None}


@cache
def _of_cached(attention: type[nn.Module]) -> frozenset[str]:
    """Return what an attention calls between reading its cache and attending, by helpers too."""
    try:
        source = inspect.getsource(attention.forward).partition(".update(")[2]
        between, attends, _ = source.partition("attention_interface(")
        called = _CALLED.findall(between) if attends else []
        helpers = [getattr(attention, name, None) for name in called]
        inner = [inspect.getsource(one) for one in helpers if inspect.isfunction(one)]
    except (OSError, TypeError):  # a class made at run time
        return frozenset()
    return frozenset([*called, *_CALLED.findall("".join(inner))])


def _network(part: nn.Module) -> list[nn.Module]:
    """Return the modules of a network of several linear layers; none of a gate, which has one."""
    modules = list(part.modules())
    return modules if len([m for m in modules if _sizes(m)]) > 1 else []


def _holds_experts(part: nn.Module) -> bool:
    stacked = any(parameter.dim() > 2 for parameter in part.parameters())
    lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
    return stacked or any(_sizes(one) is not None for each in lists for one in each.modules())


def _sizes(part: nn.Module) -> tuple[int, int] | None:
    if isinstance(part, Conv1D):
        return part.nx, part.nf
    sizes = getattr(part, "in_features", None), getattr(part, "out_features", None)
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]
