"""Wings' router inside fused attention against attention weights written out.

    python benchmarks/wings_router.py [--length 2048] [--pairs 20] [--json]

Forward and backward of one attention of SmolLM2's shape (9 heads of 64, 3 of keys and values) with
the router's logits, from the same queries, keys and values to the same gradients. Explicit weights
are read in two ways: head by head, ``sum over heads of a W^T``, which is what the numbers to reach
were set by; and summed over heads first, the quickest that we know. Memory is the peak above the
inputs, in a process of its own each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from pairs import Peak, Ratio, Row, alternate, clock, in_child, options, show
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmgraft.grafts.wings.router import Router, route

HEADS, KEY_HEADS, SIZE = 9, 3, 64
PADDING = 128
FASTER = {"unpadded": 4.0, "padded": 2.3}
MEMORY = 0.2
LINEAR = 2.2  # twice as long takes at most so many times the memory


class Attention(nn.Module):
    """An attention without its projections, called through transformers' registry."""

    num_key_value_groups = HEADS // KEY_HEADS

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            _attn_implementation="sdpa", _attn_implementation_internal="sdpa"
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
        """Output ``(b, s, n, d)`` and no weights."""
        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation_internal]
        return function(self, query, key, value, mask, scaling=SIZE**-0.5)


class Case:
    """Inputs of both sides, and the gradients of their outputs."""

    def __init__(self, length: int, padded: bool) -> None:
        draw = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        self.attention, self.router = Attention(), Router(length)
        self.router.weight.data.copy_(random(2, length))
        inputs = (random(1, n, length, SIZE) for n in (HEADS, KEY_HEADS, KEY_HEADS))
        self.inputs = [tensor.requires_grad_() for tensor in inputs]
        self.given = random(1, length, HEADS, SIZE), random(1, length, 2)
        index = torch.arange(length)
        self.positions = index[None]
        self.padding = self.positions < (PADDING if padded else 0)
        self.mask = None
        self.causal = torch.zeros(1, 1, length, length)
        seen = index[None, :] <= index[:, None]
        if padded:
            self.positions = (self.positions - PADDING).clamp(min=0)
            seen = seen & ~self.padding | self.padding.t()  # a padded query sees all, as in a base
            self.mask = seen[None, None]
            self.given[0][:, :PADDING] = 0  # nothing is learned from padding
            self.given[1][:, :PADDING] = 0
        self.causal.masked_fill_(~seen, torch.finfo(torch.float32).min)

    @property
    def learned(self) -> list[Tensor]:
        """Tensors that get gradients."""
        return [*self.inputs, self.router.weight]

    def fused(self) -> tuple[Tensor, ...]:
        """Through `mmgraft.grafts.wings.router`; gives gradients."""
        (out, _), logits = route(
            self.attention.forward,
            self.attention,
            lambda count: self.router.columns(self.positions[:, :count]),
            True,
            (*self.inputs, self.mask),
            {},
        )
        return torch.autograd.grad((out, logits), self.learned, self.given)

    def explicit(self, by_head: bool = True) -> tuple[Tensor, ...]:
        """From a map of ``s x s`` a head, read head by head or summed first; gives gradients."""
        query, key, value = self.inputs
        key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * SIZE**-0.5 + self.causal
        weights = scores.softmax(-1, dtype=torch.float32)
        out = (weights @ value).transpose(1, 2).contiguous()
        columns = self.router.columns(self.positions)
        logits = (weights @ columns[:, None]).sum(1) if by_head else weights.sum(1) @ columns
        return torch.autograd.grad((out, logits), self.learned, self.given)

    def check(self) -> None:
        """All compute the same."""
        for theirs in (self.explicit(True), self.explicit(False)):
            for one, other in zip(self.fused(), theirs, strict=True):
                torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def main() -> int:
    """Measure, and print a row for speed without and with padding and one for memory."""
    parser = options(__doc__)
    parser.add_argument("--length", type=int, default=2048)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [_speed(given, name, by_head) for name in FASTER for by_head in (True, False)]
    return show(given, [*rows, _memory(given)])


def _speed(given: argparse.Namespace, name: str, by_head: bool) -> Row:
    Case(256, padded=name == "padded").check()
    case = Case(given.length, padded=name == "padded")
    explicit = partial(case.explicit, by_head)
    timed = alternate(case.fused, explicit, pairs=given.pairs, clock=clock(given))
    faster: Ratio = timed.ratio.inverse()
    return Row(
        f"Wings router inside fused attention, s = {given.length}, {name}, forward + backward",
        f"explicit attention weights, {'head by head' if by_head else 'summed over heads first'}",
        f"{faster} times faster ({timed.seconds[0]:.2f} of {timed.seconds[1]:.2f} s)",
        f"{FASTER[name]:g}x faster" if by_head else "reported",
        _above(faster, FASTER[name]) if by_head else None,
        {"seconds": timed.seconds, "faster": faster.median},
    )


def _memory(given: argparse.Namespace) -> Row:
    length = given.length
    found = {
        name: in_child(_peak, name, at)["peak"]
        for name, at in (("fused", length), ("explicit", length))
    }
    longer = in_child(_peak, "fused", 2 * length)["peak"]
    ratio, growth = found["fused"] / found["explicit"], longer / found["fused"]
    return Row(
        f"memory of the same, s = {length}, unpadded",
        "explicit attention weights",
        f"{ratio:.3f}x ({found['fused'] / 1e6:.0f} of {found['explicit'] / 1e6:.0f} MB); "
        f"{growth:.2f}x at twice the length",
        f"{MEMORY:g}x, linear in s",
        ratio <= MEMORY and growth <= LINEAR,
        {**found, "at twice the length": longer},
    )


def _peak(name: str, length: int) -> dict[str, Any]:
    case = Case(length, padded=False)
    work: Callable[[], Any] = getattr(case, name)
    if name == "fused":
        del case.causal
    with Peak() as peak:
        work()
    return {"peak": peak.bytes}


def _above(ratio: Ratio, limit: float) -> bool | None:
    found = ratio.below(limit)
    return None if found is None else not found


if __name__ == "__main__":
    raise SystemExit(main())
