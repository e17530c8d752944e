"""Decoder layers and final norms that act on the rows of their workflow alone."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

STRIDE = 1 << 24
"""A position of workflow ``w`` is its place in the sequence plus ``w * STRIDE``; 0 is the base."""


class Step:
    """The workflows of one forward pass.

    Attributes:
        workflows: Numbers of the workflows whose layers and norms run.
    """

    def __init__(self) -> None:
        self.workflows: tuple[int, ...] = ()


class Feed:
    """Hidden states between the layers of a ``beside`` workflow, within one forward pass.

    Args:
        number: Of the workflow.

    Attributes:
        entered: Hidden states into the base layer that comes before an inserted one.
        control: Output of the last inserted layer.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.entered: Tensor | None = None
        self.control: Tensor | None = None


class Gate(nn.Module):
    """Gate of an inserted layer: a linear layer ``h -> h``, or one scalar."""

    def __init__(self, size: int, scalar: bool) -> None:
        super().__init__()
        self.linear = None if scalar else nn.Linear(size, size, bias=False)
        self.scale = nn.Parameter(torch.zeros(1)) if scalar else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the gated states: ``(t, h) -> (t, h)``."""
        return self.linear(hidden) if self.linear is not None else hidden * cast(Tensor, self.scale)


@cache
def base_layer(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a base's layer, which reads plain positions.

    Its attributes are ``step``, the :class:`Step` of the model, and ``feeds``, the :class:`Feed` of
    each workflow that needs its input. Its method ``alone`` is the base's own, for a step without
    workflows, whose positions are plain as they come.
    """

    class BaseLayer(kind):
        step: Step
        feeds: list[Feed]
        alone = kind.forward

        def forward(
            self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **kwargs: Any
        ) -> Any:
            for feed in self.feeds:
                if feed.number not in self.step.workflows:
                    continue
                # vLLM's fused norms write into their arguments.
                feed.entered = (
                    hidden_states.clone() if residual is None else hidden_states + residual
                )
            return super().forward(positions & (STRIDE - 1), hidden_states, residual, **kwargs)

    return BaseLayer


@cache
def inserted_layer(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of an inserted layer, computed for all rows and kept for its workflow's.

    A step without its workflow leaves it out, and then its keys and values of other rows are not
    written. No row of the workflow reads them: what it reads are its own positions, and blocks of
    the prefix cache that were written by rows of the workflow too (see ``processor``).

    Its attributes are ``step``; ``workflow``, its number; ``gate``, a :class:`Gate` or None; and
    ``feed`` with ``opens`` (it is the first layer of its workflow) where it stands beside the
    decoder.
    """

    class InsertedLayer(kind):
        step: Step
        workflow: int
        gate: Any
        feed: Any
        opens: bool

        def forward(
            self, positions: Tensor, hidden_states: Tensor, residual: Tensor, **kwargs: Any
        ) -> Any:
            if self.workflow not in self.step.workflows:
                return hidden_states, residual
            mine = (positions // STRIDE).eq(self.workflow)[:, None]
            plain = positions & (STRIDE - 1)
            if self.feed is not None:
                given = self.feed.entered if self.opens else self.feed.entered + self.feed.control
                out, left = super().forward(plain, given, None, **kwargs)
                self.feed.control = out + left
                changed = hidden_states + self.gate(self.feed.control)
                return torch.where(mine, changed, hidden_states), residual
            out, left = super().forward(plain, hidden_states.clone(), residual.clone(), **kwargs)
            if self.gate is not None:
                changed = hidden_states + self.gate(out + left)
                return torch.where(mine, changed, hidden_states), residual
            return torch.where(mine, out, hidden_states), torch.where(mine, left, residual)

    return InsertedLayer


class Norms(nn.Module):
    """The base's final norm, and those of workflows that have one, side by side.

    Args:
        base: The base's.
        own: The workflows', by their number.
        step: Of the model.
    """

    def __init__(self, base: nn.Module, own: dict[int, nn.Module], step: Step) -> None:
        super().__init__()
        self.base, self.own = base, nn.ModuleDict({str(one): norm for one, norm in own.items()})
        self.step = step

    def running(self) -> list[int]:
        """Return the numbers of the workflows with a norm of their own that the step runs."""
        return [one for one in self.step.workflows if str(one) in self.own]

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(t, h * norms)``, the base's first, and the residual stream."""
        own = [self.own[str(one)](hidden.clone(), residual.clone())[0] for one in self.running()]
        base, residual = self.base(hidden, residual)
        return (torch.cat([base, *own], dim=-1) if own else base), residual


class BaseDecoder(nn.Module):
    """The base's decoder alone, for a step in which no row has a workflow.

    Args:
        layers: The base's, shared with the decoder that has all layers.
        norm: The base's final norm.
    """

    def __init__(self, layers: list[Any], norm: nn.Module) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Return the normed hidden states: ``(t, h) -> (t, h)``."""
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer.alone(positions, hidden_states, residual)
        return self.norm(hidden_states, residual)[0]
