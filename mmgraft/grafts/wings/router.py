"""Wings' router: weights of the two learners from the main attention's own weights.

The router's logits are ``sum over heads of a W^T`` with ``a (s, S)`` a head's attention weights and
one column of ``W (2, s_max)`` per key position. That product is attention whose values are the
router's columns, so :func:`route` puts the two columns beside each key's value vector and reads the
logits from the extra output columns: no ``s x S`` matrix is kept. Bases whose attention cannot be
called so (no attention registry, soft-capping, sinks) take the explicit weights instead.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmgraft.errors import UsageError
from mmgraft.grafts.computing import computes_on, is_flash

IMPLEMENTATION = "mmgraft_router"
_JOB = "_mmgraft_router_job"
_WIDEST_FUSED = 256  # the widest head that CUDA's flash kernel takes


class Router(nn.Module):
    """Columns ``W (2, s_max)``, zero at the start (equal weights), no bias."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, length))

    def columns(self, positions: Tensor) -> Tensor:
        """Columns of the keys' own positions, none below 0: ``(b, S) -> (b, S, 2)``."""
        chosen = self.weight.index_select(1, positions.flatten())
        return chosen.view(2, *positions.shape).movedim(0, -1)


@dataclass
class _Job:
    implementation: str
    columns: Callable[[int], Tensor]  # number of keys -> (b, S, 2)
    outer: "_Job | None"
    logits: list[Tensor] = field(default_factory=list)


def route(
    original: Callable[..., Any],
    attention: Any,
    columns: Callable[[int], Tensor],
    fused: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Tensor]:
    """Run a base's attention and get the router's logits with it.

    Args:
        original: The attention's forward.
        attention: The attention module.
        columns: Gives the router's columns ``(b, S, 2)`` for a number of keys ``S``.
        fused: Through the attention registry; else from explicit weights.
        args: Positional arguments of the attention.
        kwargs: Keyword arguments of the attention.

    Returns:
        What the attention returned, and the logits ``(b, s, 2)`` in fp32.
    """
    run = partial(original, *args, **kwargs)
    if not fused:
        return _explicit(run, attention, columns)
    config = attention.config
    job = _Job(config._attn_implementation, columns, attention.__dict__.get(_JOB))
    attention.__dict__[_JOB] = job
    config._attn_implementation_internal = IMPLEMENTATION
    try:
        out = run()
    finally:
        config._attn_implementation_internal = job.implementation
        attention.__dict__[_JOB] = job.outer
    return out, job.logits[0]


def _router_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run the base's attention function over values widened by the router's columns."""
    job: _Job = module.__dict__[_JOB]

    def inner(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        module.__dict__[_JOB] = job.outer
        # Flash attention looks in the config for which of its packages it is.
        module.config._attn_implementation_internal = job.implementation  # type: ignore[union-attr]
        base = ALL_ATTENTION_FUNCTIONS[job.implementation]
        return base(module, query, key, value, mask, **kwargs)[0]  # (b, s, n, width)

    size, heads = value.shape[-1], key.shape[1]
    kwargs["scaling"] = kwargs.get("scaling") or query.shape[-1] ** -0.5
    columns = job.columns(key.shape[2]).to(value.dtype)  # (b, S, 2)
    if query.shape[2] == 1 and _has_plain_weights(job.implementation, key, attention_mask, kwargs):
        out = inner(query, key, value, attention_mask)
        job.logits.append(_one_query(query, key, attention_mask, columns, kwargs["scaling"]))
        return out, None
    columns = columns[:, None].expand(-1, heads, -1, -1)  # (b, kv heads, S, 2)
    width = -(-(max(size, query.shape[-1]) + 2) // 8) * 8
    wide = computes_on(query) == "cuda" and width > _WIDEST_FUSED
    if wide or not torch.is_grad_enabled():  # wider keys would round the base's own result anew
        out = inner(query, key, value, attention_mask)
        routed = inner(query, key, F.pad(columns, (0, query.shape[-1] - 2)), attention_mask)
    else:
        value = F.pad(torch.cat([value, columns], dim=-1), (0, width - size - 2))
        query = F.pad(query, (0, width - query.shape[-1]))
        key = F.pad(key, (0, width - key.shape[-1]))
        both = inner(query, key, value, attention_mask)
        out, routed, _ = both.split([size, 2, width - size - 2], dim=-1)
    job.logits.append(routed[..., :2].float().sum(dim=2))
    return out.contiguous(), None


def _has_plain_weights(
    implementation: str, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Tell whether a single query's weights follow from its scores and a mask of the keys alone."""
    if kwargs.get("dropout"):
        return False
    if not is_flash(implementation):
        return implementation == "sdpa"
    keys, window = key.shape[2], kwargs.get("sliding_window")
    return (mask is None or mask.shape[-1] == keys) and (window is None or keys <= window)


def _one_query(
    query: Tensor, key: Tensor, mask: Tensor | None, columns: Tensor, scaling: float
) -> Tensor:
    """Logits ``(b, 1, 2)`` of a single new token: its weights are few, and no key is copied."""
    grouped = query.unflatten(1, (key.shape[1], -1)).squeeze(3).flatten(0, 1)
    none = query.new_empty(1, 1, 1)
    products = torch.baddbmm(
        none, grouped, key.flatten(0, 1).transpose(-1, -2), beta=0, alpha=scaling
    )
    scores = products.unflatten(0, key.shape[:2])  # (b, kv heads, group, S)
    if mask is not None:
        if mask.dim() == 2:  # flash attention's: (b, S), true at keys that are no padding
            mask = mask.bool()[:, None, None, :]
        mask = mask if mask.shape[1] == 1 else mask.unflatten(1, scores.shape[1:3]).squeeze(3)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    summed = scores.softmax(-1, dtype=torch.float32).sum((1, 2))[:, None]  # (b, 1, S)
    return summed @ columns.float()


AttentionInterface.register(IMPLEMENTATION, _router_attention)


def _explicit(
    run: Callable[[], Any], attention: nn.Module, columns: Callable[[int], Tensor]
) -> tuple[Any, Tensor]:
    with _CatchWeights() as caught:
        out = run()
    weights = out[1] if isinstance(out, tuple) and isinstance(out[1], Tensor) else caught.weights
    if weights is None:
        raise UsageError(
            f"{type(attention).__name__} gave no attention weights for the router of Wings: load "
            "the base with attn_implementation='eager'."
        )
    summed = weights.float().sum(dim=1)  # (b, s, S)
    return out, summed @ columns(summed.shape[-1]).float()


class _CatchWeights(TorchFunctionMode):
    """Compute the weights of an attention that calls torch's fused kernel by itself."""

    weights: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.weights = explicit_weights(*args[:2], **kwargs)
        return func(*args, **kwargs)


def explicit_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **_: Any,
) -> Tensor:
    """Attention weights ``(b, n, s, S)`` that torch's fused kernel would use."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1, dtype=torch.float32)
