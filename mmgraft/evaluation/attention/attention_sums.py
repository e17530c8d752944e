"""Sums of attention weights over chosen keys, without a map of them.

What a query gives to a set of keys is attention whose values are the set's columns: 1 at a key of
the set and 0 elsewhere. So an attention is called a second time with such columns in place of its
values, and what it returns is summed over the queries. The first call, whose result the base goes
on with, is left as it was.

An attention that has no fused kernel (soft-capping, sinks, ``eager``) is computed in blocks of
queries, so that it never holds more than a block's weights. Attentions outside of transformers'
registry either call torch's fused kernel, which is met there, or hand back the weights that they
have computed for themselves; those are summed and dropped layer by layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmgraft.errors import UsageError
from mmgraft.patching import patched_forward

IMPLEMENTATION = "mmgraft_sums"
BLOCK = 128
"""Queries whose explicit weights are held at a time."""

_JOB = "_mmgraft_sums_job"


@dataclass
class AttentionSums:
    """``sum over queries i of mean over heads of sum over keys j in S of a_ij``, for sets ``S``.

    Attributes:
        columns: Which key belongs to which set, ``(b, S, c)`` of 0 and 1.
        queries: Which queries are summed over, ``(b, s)``: those that are no padding.
        whole: Explicit weights are computed whole and handed on, for a graft that reads them
            beside an attention without a fused kernel.
        sums: What was found, by the attention's name: ``(b, c)`` in fp32.
    """

    columns: Tensor
    queries: Tensor
    whole: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def of(self, attentions: Mapping[str, nn.Module], registry: bool) -> Iterator[AttentionSums]:
        """Sum every forward of these attentions while the block lasts.

        Args:
            attentions: Attention modules of decoder layers, by the names that ``sums`` gets.
            registry: They call a function of transformers' attention registry; see
                :attr:`mmgraft.anatomy.Anatomy.attention_in_registry`.

        Raises:
            UsageError: An attention whose weights cannot be found out, when it runs.
        """
        with ExitStack() as stack:
            for name, attention in attentions.items():
                plain = cast(Any, attention).config._attn_implementation if registry else None
                watch = partial(self._watch, name, attention, plain)
                stack.enter_context(patched_forward(attention, watch))
            yield self

    def weigh(self, call: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """Return what each query gives to each set, ``(b, s, c)``.

        Args:
            call: The attention as a function of its values; gives ``(b, s, heads, width)``.
            values: The real values ``(b, kv heads, S, width)``: the columns take their place.
        """
        count, width = self.columns.shape[-1], max(values.shape[-1], self.columns.shape[-1])
        columns = F.pad(self.columns.to(values), (0, width - count))  # (b, S, width)
        out = call(columns[:, None].expand(-1, values.shape[1], -1, -1))
        return out[..., :count].float().mean(dim=2)

    def add(self, name: str, given: Tensor, start: int = 0) -> None:
        """Sum ``given (b, queries, c)``, which is that of the queries from ``start`` on."""
        counted = self.queries[:, start : start + given.shape[1], None].to(given.device)
        total = given.float().masked_fill(~counted, 0.0).sum(dim=1)  # (b, c)
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def add_weights(self, name: str, weights: Tensor, start: int = 0) -> None:
        """Sum explicit weights ``(b, heads, queries, S)``."""
        mean = weights.float().mean(dim=1)
        self.add(name, mean @ self.columns.to(mean), start)

    def _watch(
        self,
        name: str,
        attention: Any,
        plain: str | None,
        original: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        forward = partial(original, *args, **kwargs)
        if plain is not None:
            job = _Job(self, name, plain, attention.config._attn_implementation)
            out = job.run(attention, forward)
        else:
            with _MeetKernel(self, name):
                out = forward()
        if name not in self.sums:
            weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
            if not isinstance(weights, Tensor) or weights.dim() != 4:
                raise UsageError(
                    f"the attention weights of {type(attention).__name__} cannot be found: it "
                    "calls no kernel that is known and does not hand them back; take a base "
                    "whose attention does, such as Llama or Qwen2"
                )
            self.add_weights(name, weights)
        return out


@dataclass
class _Job:
    """One call of an attention that goes through transformers' registry."""

    into: AttentionSums
    name: str
    plain: str  # the base's own implementation
    active: str  # the one in place now: the base's own, or a graft's around it

    def run(self, attention: Any, forward: Callable[[], Any]) -> Any:
        config = attention.config
        attention.__dict__[_JOB] = self
        config._attn_implementation_internal = IMPLEMENTATION
        try:
            return forward()
        finally:
            config._attn_implementation_internal = self.active
            del attention.__dict__[_JOB]


def _summing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Call the base's attention function once more, with columns for values."""
    job: _Job = module.__dict__[_JOB]
    if job.active == "eager":
        return _eager(job, module, query, key, value, attention_mask, kwargs)
    config = cast(Any, module).config

    def run(kernel: str, value: Tensor) -> Any:
        config._attn_implementation_internal = kernel  # where flash attention looks for its package
        return ALL_ATTENTION_FUNCTIONS[kernel](module, query, key, value, attention_mask, **kwargs)

    out = run(job.active, value)

    def call(columns: Tensor) -> Tensor:
        return run(job.plain, columns)[0]

    job.into.add(job.name, job.into.weigh(call, value))
    return out


AttentionInterface.register(IMPLEMENTATION, _summing_attention)


def _eager(
    job: _Job,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Call the architecture's explicit attention, in blocks of queries ``(b, n, <= BLOCK, d)``."""
    inner = _eager_function(module)
    if job.into.whole:
        out, weights = inner(module, query, key, value, mask, **kwargs)
        job.into.add_weights(job.name, weights)
        return out, weights
    pieces = []
    for start in range(0, query.shape[2], BLOCK):
        end = start + BLOCK
        own = mask[:, :, start:end] if mask is not None and mask.shape[2] > 1 else mask
        out, weights = inner(module, query[:, :, start:end], key, value, own, **kwargs)
        job.into.add_weights(job.name, weights, start)
        pieces.append(out)
    return torch.cat(pieces, dim=1), None  # (b, s, n, d)


def _eager_function(attention: nn.Module) -> Callable[..., Any]:
    """Return the explicit attention that a model's file defines beside its attention class."""
    names = inspect.unwrap(type(attention).forward).__globals__
    found = names.get("eager_attention_forward")
    if found is None:
        raise UsageError(
            f"{type(attention).__name__} has no explicit attention function that could be called "
            "in blocks; load the base with another attention implementation"
        )
    return found


class _MeetKernel(TorchFunctionMode):
    """Meets the calls of torch's fused kernel in an attention outside of the registry."""

    def __init__(self, into: AttentionSums, name: str) -> None:
        super().__init__()
        self.into = into
        self.name = name

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self.name not in self.into.sums:
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            value, rest = given.pop("value"), args[3:]

            def call(columns: Tensor) -> Tensor:
                query, key = given["query"], given["key"]
                others = {k: v for k, v in given.items() if k not in ("query", "key")}
                return func(query, key, columns, *rest, **others).transpose(1, 2)

            self.into.add(self.name, self.into.weigh(call, value))
        return out
