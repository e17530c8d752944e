"""``perceiver``: learned latents that read the features, as Flamingo and as Idefics2 have them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmgraft.vision.projectors.built_in import Resampler, draw_anew


class PerceiverProjector(Resampler):
    """``latents`` vectors an image or a view; see ``PerceiverConfig``.

    Latents start at random in both forms: equal ones, as Idefics2 has them, would stay equal
    wherever no positions tell them apart.
    """

    def __init__(self, config: Any, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features)
        c, flamingo = self.config, self.config.form == "flamingo"
        width = in_features if flamingo else out_features
        norm: Callable[[int], nn.Module] = (
            nn.LayerNorm if flamingo else partial(nn.RMSNorm, eps=1e-6)
        )
        feedforward = _plain if flamingo else _Gated
        self.before = (
            nn.Identity() if flamingo else _Gated(in_features, c.hidden or 4 * width, width)
        )
        self.latents = nn.Parameter(torch.randn(c.latents, width) * (1.0 if flamingo else 0.02))
        self.layers = nn.ModuleList(
            _Layer(width, c, norm, feedforward(width, 4 * width, width)) for _ in range(c.layers)
        )
        self.norm = norm(width)
        self.linear = nn.Linear(width, out_features) if flamingo else nn.Identity()
        draw_anew([self.linear if flamingo else self.norm], c.init_scale)

    def resample(self, features: Tensor) -> Tensor:
        dtype = self.latents.dtype  # of the norms, whatever autocast makes of the projection
        features = self.before(features.to(dtype)).to(dtype)
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        return self.linear(self.norm(latents))


class _Layer(nn.Module):
    """Latents read the features and themselves, then a feed-forward; both are added."""

    def __init__(
        self, width: int, config: Any, norm: Callable[[int], nn.Module], feedforward: nn.Module
    ) -> None:
        super().__init__()
        heads, kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim, self.grouped = config.head_dim, kv_heads < heads
        self.norm_features, self.norm_latents, self.norm = norm(width), norm(width), norm(width)
        self.q = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(heads * self.head_dim, width, bias=False)
        self.feedforward = feedforward

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        own = self.norm_latents(latents)
        both = torch.cat([self.norm_features(features), own], dim=1)
        q, k, v = (
            made.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for made in (self.q(own), self.k(both), self.v(both))
        )
        read = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped)
        latents = latents + self.out(read.transpose(1, 2).flatten(2))
        return latents + self.feedforward(self.norm(latents))


def _plain(width: int, hidden: int, out: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, out, bias=False)
    )


class _Gated(nn.Module):
    """``down(SiLU(gate(x)) * up(x))``."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
