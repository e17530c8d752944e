"""The function between the output of a causal LM's head and its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from mmgraft.anatomy.stand_ins import first_argument, snapped, with_stand_ins


class LogitsUnknown(Exception):
    """The logits are not a scaled and soft-capped head output; the message says why."""


class _Output(BaseModelOutputWithPast):
    """The output of the inner model; whatever a class asks of it beyond the state is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _logits(model: nn.Module, head: str, trunk: str, state: torch.Tensor) -> torch.Tensor:
    def answer(name: str, args: tuple, kwargs: dict) -> Any:
        if name == head:
            return first_argument(args, kwargs).clone()
        return _Output(last_hidden_state=state.clone())

    twin = with_stand_ins(model, answer, opened=(head, trunk))
    try:
        out = type(model).forward(twin, input_ids=torch.zeros(1, 1, dtype=torch.long))
        logits = out[0] if isinstance(out, tuple) else out.logits
    except Exception as error:  # whatever a foreign forward may raise
        raise LogitsUnknown(
            f"{type(model).__name__}.forward could not be followed "
            f"({type(error).__name__}: {error})"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != state.shape:
        raise LogitsUnknown(f"{type(model).__name__} does not return what its head gives")
    return logits.double()


@torch.no_grad()
def examine_logits(model: nn.Module, head: str, trunk: str) -> tuple[float, float | None]:
    """Find the factor and the soft cap between the head's output z and the logits.

    The model's own ``forward`` runs with stand-ins for the inner model and the head, so that z is a
    known grid. Fitted is ``scale * z``, or ``cap * tanh(scale * z / cap)``.

    Args:
        model: A causal LM, on any device.
        head: Dotted name of its head.
        trunk: Dotted name of the inner model, which owns the list of layers.

    Returns:
        The factor, and the cap or None.

    Raises:
        LogitsUnknown: The logits are another function of z.
    """
    grid = torch.cat([torch.tensor([1e-4, 1e7]), torch.linspace(-40.0, 40.0, 30)]).double()
    logits = _logits(model, head, trunk, grid.view(1, 1, -1)).flatten()
    scale, cap = float(logits[0] / grid[0]), None
    fitted = scale * grid
    if not torch.allclose(logits, fitted, rtol=1e-5):
        cap = float(logits[1])
        fitted = cap * torch.tanh(scale * grid / cap)
    if scale == 0 or not torch.allclose(logits, fitted, rtol=1e-5):
        raise LogitsUnknown(
            f"{type(model).__name__} makes its logits in a way that is neither a factor nor a "
            "tanh soft cap"
        )
    return snapped(scale, 1e-7), None if cap is None else snapped(cap, 1e-7)
