"""A cache layer with room ahead: what a token adds is written behind what is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

_SLACK = 64
"""Positions of room at least; an eighth of what is there where that is more."""


class PreallocatedLayer(DynamicLayer):
    """A :class:`DynamicLayer` whose tensors are views of larger ones.

    A dynamic layer copies all keys and values for every token. Here they are copied when the room
    is used up, or when something else replaced them (a reorder, a crop, a repeat): then the tensors
    shown are not the ones last handed out. Under autograd nothing is written in place.
    """

    _room: tuple[Tensor, Tensor] | None = None
    _shown: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        past = self.get_seq_length()
        if past == 0 or torch.is_grad_enabled():
            self._room = self._shown = None
            return super().update(key_states, value_states, *args, **kwargs)
        total = past + key_states.shape[-2]
        if not self._fits(total):
            room = total + max(_SLACK, total // 8)
            self._room = _copied(self.keys, room), _copied(self.values, room)
        assert self._room is not None
        keys, values = self._room
        keys[..., past:total, :] = key_states
        values[..., past:total, :] = value_states
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]
        self._shown = self.keys, self.values
        return self._shown

    def _fits(self, total: int) -> bool:
        if self._room is None or self._shown is None or self._room[0].shape[-2] < total:
            return False
        ours = self.keys is self._shown[0] and self.values is self._shown[1]
        return ours and self._room[0].is_inference() <= torch.is_inference_mode_enabled()

    def offload(self) -> None:
        self._room = self._shown = None
        super().offload()

    def reset(self) -> None:
        self._room = self._shown = None
        super().reset()


def _copied(tensor: Tensor | None, room: int) -> Tensor:
    """Copy a tensor to the front of one of so many positions, ``(b, n, room, d)``."""
    assert tensor is not None
    wide = tensor.new_empty(*tensor.shape[:-2], room, tensor.shape[-1])
    wide[..., : tensor.shape[-2], :] = tensor
    return wide
