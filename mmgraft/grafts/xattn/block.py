"""One block of gated cross-attention.

``y = x + g(alpha) * Attention(norm(x), images)``, then ``y + g(beta) * FeedForward(norm(y))``, both
at the positions that see an image; ``x`` elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmgraft.anatomy import Anatomy
from mmgraft.grafts.xattn.config import XattnConfig, feedforward_width

_EPS = 1e-6


class _Half(nn.Module):
    """Half of a block: a norm before, a gate behind."""

    def __init__(self, config: XattnConfig, size: int) -> None:
        super().__init__()
        self.tanh = config.gate == "tanh"
        self.norm = (nn.LayerNorm if config.layer_norm else nn.RMSNorm)(size, eps=_EPS)
        wide = size if config.gate_size == "channel" else 1
        self.gate = nn.Parameter(torch.full((wide,), config.gate_init))

    def opening(self) -> Tensor:
        """Return what is multiplied with what this half adds."""
        return self.gate.tanh() if self.tanh else self.gate

    def normed(self, x: Tensor) -> Tensor:
        """Return the norm of ``x`` in the dtype of its weights."""
        return self.norm(x.to(self.norm.weight.dtype))


class CrossAttention(_Half):
    """Queries from the sequence ``(b, s, h)``, keys and values from images; no positions."""

    def __init__(self, config: XattnConfig, anatomy: Anatomy) -> None:
        size = anatomy.hidden_size
        super().__init__(config, size)
        self.heads, self.groups, self.width = config.head_shape(anatomy)
        self.query = nn.Linear(size, self.heads * self.width, bias=False)
        self.key = nn.Linear(anatomy.embedding_size, self.groups * self.width, bias=False)
        self.value = nn.Linear(anatomy.embedding_size, self.groups * self.width, bias=False)
        self.output = nn.Linear(self.heads * self.width, size, bias=False)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(self.width, eps=_EPS) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of vectors ``(T, h)``, each ``(T, groups, width)``."""
        images = images.to(self.key.weight.dtype)
        keys, values = self.key(images), self.value(images)
        keys, values = (one.unflatten(-1, (self.groups, self.width)) for one in (keys, values))
        return _as(self.key_norm, keys), values

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Add what the queries read.

        Args:
            x: ``(b, s, h)``.
            keys: ``(b, groups, T, width)``.
            values: Likewise.
            mask: ``(b, 1, s, T)``, in each row of which something is true.
        """
        query = self.query(self.normed(x)).unflatten(-1, (self.heads, self.width))
        query = _as(self.query_norm, query).transpose(1, 2)  # (b, heads, s, width)
        shared = self.heads // self.groups
        if shared > 1:
            keys, values = (one.repeat_interleave(shared, dim=1) for one in (keys, values))
        keys, values = keys.to(query.dtype), values.to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return x + self.opening() * self.output(mixed.transpose(1, 2).flatten(2))


class FeedForward(_Half):
    """SwiGLU, or two linear layers with a GELU between."""

    def __init__(self, config: XattnConfig, size: int, inner: int) -> None:
        super().__init__(config, size)
        self.up = nn.Linear(size, inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)
        gated = config.feedforward == "base"
        self.swish = nn.Linear(size, inner, bias=False) if gated else None
        self.act = nn.SiLU() if gated else nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.normed(x)
        inner = self.up(normed)
        inner = self.act(inner) if self.swish is None else self.act(self.swish(normed)) * inner
        return x + self.opening() * self.down(inner)


class Block(nn.Module):
    """Cross-attention, and a feed-forward where the settings have one."""

    def __init__(self, config: XattnConfig, anatomy: Anatomy) -> None:
        super().__init__()
        self.attention = CrossAttention(config, anatomy)
        inner = feedforward_width(config, anatomy)
        self.feedforward = FeedForward(config, anatomy.hidden_size, inner) if inner else None

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor, seen: Tensor
    ) -> Tensor:
        """Run it where an image is ``seen (b, s, 1)``; ``x`` is as it was elsewhere."""
        # Of zeros both halves are finite, whatever stands at a position that sees nothing.
        y = self.attention(torch.where(seen, x, 0.0), keys, values, mask)
        if self.feedforward is not None:
            y = self.feedforward(y)
        return torch.where(seen, y.to(x.dtype), x)

    def halves(self) -> dict[str, _Half]:
        """Return its halves by the names of their parameter groups."""
        found: dict[str, Any] = {"attention": self.attention, "feedforward": self.feedforward}
        return {name: half for name, half in found.items() if half is not None}


def _as(norm: nn.Module, x: Tensor) -> Tensor:
    """Return a norm over the last axis, in the dtype of its weights where it has any."""
    weight = getattr(norm, "weight", None)
    return norm(x if weight is None else x.to(weight.dtype))
