"""The way in which the attention's output joins the residual stream of a decoder layer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmgraft.anatomy.stand_ins import first_argument, required_as_none, snapped, with_stand_ins

# Attention hands back its output alone, or with its weights, or with a cache too; a feed-forward
# its output alone or with router scores. Which one a layer unpacks is seen by trying.
_ATTENTION_RETURNS = (2, 1, 3)
_OTHER_RETURNS = (1, 2)


@dataclass(frozen=True)
class Branch:
    """Findings of the probe in one decoder layer.

    Attributes:
        scale: Factor on the attention's output where it joins the residual stream.
        norm: Name of the norm that the attention's output passes first, if any.
        parallel: The feed-forward does not read the attention's output.
    """

    scale: float
    norm: str | None
    parallel: bool


class BranchUnknown(Exception):
    """Nothing can be added to this layer's attention branch; the message says why."""


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation, by its class name."""
    name = type(module).__name__.lower()
    return "norm" in name and "atten" not in name


@dataclass
class _Run:
    """One forward of a layer: ``state`` goes in, its attention gives ``branch``."""

    state: torch.Tensor
    branch: torch.Tensor
    children: dict[str, nn.Module]
    attention: str
    returns: tuple[int, int]
    on_branch: list[str] = field(default_factory=list)
    fed: torch.Tensor | None = None
    _branch_memory: set[int] = field(default_factory=set)
    _alive: list[torch.Tensor] = field(default_factory=list)

    def answer(self, name: str, args: tuple, kwargs: dict) -> Any:
        given = first_argument(args, kwargs)
        # A second tensor of the state's shape is a residual that the child adds by itself.
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        others = (v for v in tensors[1:] if v is not given)  # CTRL's query, key and value are one
        residual = next((v for v in others if v.shape == given.shape), None)
        child = self.children[name]
        if name == self.attention:
            out = self.branch.clone()
            if residual is None:
                self._branch_memory.add(out.data_ptr())
            else:
                out = out + residual
            return self._packed(out, self.returns[0])
        followed = given.data_ptr() in self._branch_memory
        if isinstance(child, nn.Dropout | nn.Identity):
            return given
        out = given.clone() if is_norm(child) else torch.zeros_like(given)
        if followed:
            self.on_branch.append(name)
            self._branch_memory.add(out.data_ptr())
        if is_norm(child):
            return self._packed(out, 1)
        if self.fed is None:
            self.fed = given.reshape(self.state.shape).clone()
        return self._packed(out if residual is None else out + residual, self.returns[1])

    def _packed(self, out: torch.Tensor, count: int) -> Any:
        self._alive.append(out)  # so that no later tensor takes its memory
        return out if count == 1 else (out, *[None] * (count - 1))


def _run(layer: nn.Module, attention: str, returns: tuple[int, int], seed: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    # A batch of 5 cannot be unpacked by mistake into two or three values.
    own = [p.shape[-1] for p in layer.parameters(recurse=False) if p.ndim]
    size = (5, 4, own[0] if own else 6)
    state = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    branch = torch.randn(size, generator=generator, dtype=torch.float64)
    run = _Run(state, branch, dict(layer.named_modules()), attention, returns)
    twin = with_stand_ins(layer, run.answer, opened=(attention,), seed=seed)
    out = type(layer).forward(twin, state.clone(), **required_as_none(layer))
    out = out[0] if isinstance(out, tuple) else out
    if not isinstance(out, torch.Tensor) or out.shape != state.shape:
        raise BranchUnknown("the decoder layer does not return one state of the shape it was given")
    return run, out


def _runs(layer: nn.Module, attention: str) -> list[tuple]:
    failure: Exception | None = None
    for returns in itertools.product(_ATTENTION_RETURNS, _OTHER_RETURNS):
        try:
            return [_run(layer, attention, returns, seed) for seed in (2, 3, 4)]
        except BranchUnknown:
            raise
        except Exception as error:  # whatever a foreign forward may raise
            failure = failure or error
    raise BranchUnknown(
        f"{type(layer).__name__}.forward could not be followed "
        f"({type(failure).__name__}: {failure})"
    )


@torch.no_grad()
def examine_branch(layer: nn.Module, attention: str) -> Branch:
    """Find out how a layer adds the output of its attention to the residual stream.

    The layer's own ``forward`` runs with stand-ins: norms and dropouts give back what they get, the
    feed-forward gives zeros, the attention gives known numbers t. The layer's output then must be
    ``x + scale * t`` for the hidden states x that go in.

    Args:
        layer: A decoder layer, on any device.
        attention: Dotted name of its attention.

    Raises:
        BranchUnknown: The output is not linear in t with one fixed factor, or something other
            than a norm or a dropout stands on the way.
    """
    runs = _runs(layer, attention)
    run, out = runs[0]
    if len(run.on_branch) > 1 or not all(is_norm(run.children[n]) for n in run.on_branch):
        raise BranchUnknown(
            f"{type(layer).__name__} passes its attention's output through "
            f"{', '.join(run.on_branch)} before it joins the residual stream"
        )
    scales = []
    for (run, out), (other, other_out) in itertools.pairwise(runs):
        ratio = (out - other_out) / (run.branch - other.branch)
        if not torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-5, atol=1e-7):
            raise BranchUnknown(
                f"{type(layer).__name__} does not add its attention's output times one number"
            )
        scales.append(ratio.mean().item())
    scale = scales[0]
    if abs(scales[1] - scale) > 1e-6 or abs(scale) < 1e-6:
        raise BranchUnknown(
            f"{type(layer).__name__} scales its attention's output by a learned number or by none"
        )
    if not torch.allclose(out - scale * run.branch, run.state):
        raise BranchUnknown(f"{type(layer).__name__} scales the residual stream itself")
    fed = [r.fed for r, _ in runs[:2]]
    parallel = fed[0] is not None and fed[1] is not None and torch.equal(fed[0], fed[1])
    return Branch(snapped(scale, 1e-9), next(iter(run.on_branch), None), parallel)
