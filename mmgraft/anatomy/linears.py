"""The linear layers inside a decoder layer, fused, turned (GPT-2's) and packed ones alike."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D


def leaf_linears(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """Find the linear layers that are given each position of a row by itself, in its place.

    Of a part that holds experts only the shared ones are found: the others are stacked tensors, or
    are called with the tokens of all rows sorted by expert, and a router is no part of the
    network's width.

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
    sizes = {name: _sizes(part) for name, part in layer.named_modules() if part not in routed}
    return {name: size for name, size in sizes.items() if size is not None}


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
