"""Shallow copies of modules whose parts are replaced by stand-ins, to see what the code does.

The copy runs the real ``forward`` of the module's class on a few numbers on the CPU, while every
child is a stand-in without weights. So it works alike for a real model of any size, a quantised
one and a skeleton on the meta device, and the original is never touched.

Two things are found by it: how the attention's output joins the residual stream of a decoder layer,
and the function between the output of a causal LM's head and its logits.
"""

import copy
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from mmgraft.frozen import Frozen


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


# Attention hands back its output alone, or with its weights, or with a cache too; a feed-forward
# its output alone or with router scores. Which one a layer unpacks is seen by trying.
_ATTENTION_RETURNS = (2, 1, 3)
_OTHER_RETURNS = (1, 2)


class Branch(Frozen):
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
