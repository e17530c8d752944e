"""Wings' learners: multi-head, low-rank attention over the initial features (arXiv 2406.03496)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmgraft.anatomy import Anatomy
from mmgraft.errors import UsageError
from mmgraft.grafts.base import Pass
from mmgraft.grafts.lowrank import LowRank


class Learner(nn.Module):
    """One learner of one layer (equation 3 of the paper, LoRRA).

    ``softmax(X (1 + W_Q) [x (1 + W_K)]^T / sqrt(d)) x (1 + W_V) W_O`` with ``X`` the hidden states
    into the layer as queries and ``x`` the initial features as keys and values. ``W_O`` has no
    residual, so a new learner adds exactly 0.
    """

    def __init__(self, size: int, rank: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = LowRank(size, rank)
        self.key = LowRank(size, rank)
        self.value = LowRank(size, rank)
        self.output = LowRank(size, rank)

    def split(self, x: Tensor) -> Tensor:
        """``(b, s, h) -> (b, heads, s, d)``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def queries(self, hidden: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Return queries ``(b, heads, s, d)`` of the hidden states into the layer ``(b, s, h)``."""
        q = self.split(hidden + self.query(hidden))
        return q if rotation is None else rotation(q)

    def keys_values(self, features: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Keys and values ``(b, heads, s, d)`` of the initial features ``(b, s, h)``."""
        k = self.split(features + self.key(features))
        v = self.split(features + self.value(features))
        return (k if rotation is None else rotation(k)), v

    def lower(self, mixed: Tensor) -> Tensor:
        """Return the first half of ``W_O`` on mixed values, ``(b, heads, s, d) -> (b, s, r)``."""
        return self.output.down(mixed.transpose(1, 2).flatten(2))

    def lift(self, low: Tensor) -> Tensor:
        """Return the second half, ``(b, s, r) -> (b, s, h)``: masks and shares are cheaper
        before it.
        """
        return self.output.up(low)


class Rotation:
    """Rotary embedding of the tokens' own positions, unscaled, over the learner's whole head.

    Tables and product are fp32; a bf16 input is rounded once, at the end.
    """

    def __init__(self, positions: Tensor, size: int, theta: float) -> None:
        steps = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
        angles = positions[:, None, :, None].float() * theta ** (-steps / size)  # (b, 1, s, d/2)
        cos, sin = angles.cos(), angles.sin()
        self.cos, self.sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def __call__(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return (x * self.cos + torch.cat([second, first], dim=-1) * self.sin).to(x.dtype)


def rotation_of(state: Pass, head_size: int, kind: int | None = None) -> Rotation | None:
    """Return the pass's rotation (of one kind's packed positions), or None for a base without
    rotary.
    """
    theta = state.anatomy.rope_theta
    if theta is None:
        return None
    key = ("rotation", head_size, kind)
    if key not in state.shared:
        positions = state.positions if kind is None else state.packed[kind].positions
        state.shared[key] = Rotation(positions, head_size, theta)
    return state.shared[key]


def learner_heads(anatomy: Anatomy, wanted: int | None) -> int:
    """Heads of a learner: the setting, else the base's. ``d = h / heads`` must be whole (and even).

    Raises:
        UsageError: The number does not fit the hidden size.
    """
    heads = wanted or anatomy.num_heads
    size = anatomy.hidden_size
    rotary = anatomy.rope_theta is not None
    if size % heads or (rotary and (size // heads) % 2):
        fitting = [n for n in range(1, 129) if size % n == 0 and not (rotary and size // n % 2)]
        raise UsageError(
            f"{heads} learner heads do not fit hidden size {size}"
            f"{' (each head needs an even size for rotary positions)' if rotary else ''}. "
            f"Set --heads to one of {', '.join(map(str, fitting))}."
        )
    return heads
