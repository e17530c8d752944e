"""Gated cross-attention (Flamingo, Llama 3.2 Vision): blocks between base layers read images.

An image keeps one position in the sequence, at which a trained vector stands. Its vectors stand
beside the sequence, and every position at or behind its own reads them in the blocks.

A block is ``y = x + g(alpha) * Attention(norm(x), images)``, then
``y + g(beta) * FeedForward(norm(y))``, both at the positions that see an image; ``x`` elsewhere.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmgraft.anatomy import Anatomy
from mmgraft.grafts.base import MEMORY, BaseParts, Graft, Pass
from mmgraft.grafts.xattn.config import XattnConfig, feedforward_width
from mmgraft.layers import parse_layers

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


#: Gates of which none is as far from 0 as this leave a block next to nothing to say.
SHUT = 0.05
_AT_ONCE = 8192  # tokens that are embedded at a time


class Marker(nn.Module):
    """The vector at an image's position, trained or as it starts."""

    vector: Tensor

    def __init__(self, start: Tensor, trained: bool) -> None:
        super().__init__()
        if trained:
            self.vector = nn.Parameter(start)
        else:
            self.register_buffer("vector", start)


class XattnGraft(Graft):
    """Blocks behind chosen base layers, and the marker of an image."""

    method = "xattn"

    def __init__(self, config: XattnConfig, anatomy: Anatomy, parts: BaseParts) -> None:
        super().__init__(config, anatomy)
        indices = parse_layers(config.layers, anatomy.num_layers)
        self.blocks = nn.ModuleDict({str(index): Block(config, anatomy) for index in indices})
        (embedding,) = parts.modules([anatomy.embedding_path])
        self.marker = Marker(_mean(embedding, anatomy.vocab_size), config.marker)
        self._first_slot = 0

    def placed(self, vectors: Tensor) -> Tensor:
        return self.marker.vector.to(vectors)[None]

    def slot_layers(self) -> list[int]:
        return [MEMORY] * len(self.blocks)

    def assign_slots(self, first: int) -> None:
        self._first_slot = first

    def begin(self, state: Pass) -> None:
        if state.any_image:
            state.memory  # noqa: B018 - found once for all layers, before the first

    def acts_on(self, index: int) -> bool:
        return str(index) in self.blocks

    def after_layer(
        self,
        index: int,
        call: Callable[[nn.Module, Tensor], Tensor],
        hidden_in: Tensor,
        hidden_out: Tensor,
        state: Pass,
        carry: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        if not state.any_image:
            return hidden_out, carry
        block = cast(Block, self.blocks[str(index)])
        read = self._read(block, list(self.blocks).index(str(index)), state)
        if read is None:  # the images were shown while the blocks were out of the path
            return hidden_out, carry
        keys, values, owner = read
        mask, seen = self._visible(owner, state)
        return block(hidden_out, keys, values, mask, seen), carry

    def _read(self, block: Block, number: int, state: Pass) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return keys, values and owners of all images so far; new ones go into the slot."""
        memory, new = state.memory, None
        if memory.features is not None:
            here = (memory.owner > 0)[:, None, :, None]
            pair = block.attention.read(memory.features)
            keys, values = (
                torch.where(here, one[memory.index].transpose(1, 2), 0.0) for one in pair
            )
            new = keys, values, memory.owner
        if state.cache is None:
            return new
        slot: Any = state.cache.layers[self._first_slot + number]
        if new is not None:
            slot.append(*new, memory.before)
        return (slot.keys, slot.values, slot.owner) if slot.is_initialized else None

    def _visible(self, owner: Tensor, state: Pass) -> tuple[Tensor, Tensor]:
        """Return which vectors each position reads ``(b, 1, s, T)``, and whether any."""
        key = ("images", id(self), owner.shape[1])
        if key not in state.shared:
            first, last = state.memory.first, state.memory.last
            if self.config.attend == "latest":
                first = torch.maximum(first, last - 1)
            mask = (owner[:, None] > first[..., None]) & (owner[:, None] <= last[..., None])
            seen = mask.any(-1, keepdim=True)
            state.shared[key] = (mask | ~seen)[:, None], seen
        return state.shared[key]

    # -- the parameters -------------------------------------------------------------------------

    def groups(self) -> dict[str, Iterable[nn.Parameter]]:
        found: dict[str, list[nn.Parameter]] = {}
        for _, name, half in self._halves():
            found.setdefault(name, []).extend(p for p in half.parameters() if p is not half.gate)
            found.setdefault("gates", []).append(half.gate)
        return {**found, "marker": list(self.marker.parameters())}

    def _halves(self) -> list[tuple[str, str, Any]]:
        return [
            (index, name, half)
            for index, block in self.blocks.items()
            for name, half in cast(Block, block).halves().items()
        ]

    def layer_modules(self) -> Sequence[tuple[int, nn.Module]]:
        return [(int(index), block) for index, block in self.blocks.items()]

    def readings(self) -> dict[str, Tensor]:
        """Return what is multiplied with what each half adds."""
        return {f"gate.{index}.{name}": half.opening() for index, name, half in self._halves()}

    def remark(self, readings: Mapping[str, float]) -> str | None:
        widest = max(map(abs, readings.values()))
        if widest >= SHUT:
            return None
        return (
            f"the gates stayed shut: none of them is above {widest:.2g} in size, so that the model "
            "sees next to nothing of an image. Train longer, or with a higher rate for gates "
            "(lr: {gates: 1.0e-2}), or graft again with --set gate_init=0.1"
        )


@torch.no_grad()
def _mean(embedding: nn.Module, rows: int) -> Tensor:
    """Average what an embedding gives for every token, in fp32."""
    weight = next(embedding.parameters())
    pieces = torch.arange(rows, device=weight.device).split(_AT_ONCE)
    return torch.stack([embedding(ids).float().sum(0) for ids in pieces]).sum(0) / rows
