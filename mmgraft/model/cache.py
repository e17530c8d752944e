"""Extra slots in transformers' own cache objects.

A grafted model keeps everything it remembers in the cache that ``generate`` already reorders,
repeats and crops: after the base's ``N`` slots stands one *row slot* (each position's kind,
position and the row's workflow), then the slots of every workflow in order of their names.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, QuantizedCache

from mmgraft.anatomy import keeps_keys
from mmgraft.errors import UsageError
from mmgraft.grafts.base import FULL_ATTENTION, MEMORY, PADDING

#: Positions of room at least; an eighth of what is there where that is more.
_SLACK = 64


def extend(cache: Cache, num_layers: int, slot_layers: Sequence[int]) -> None:
    """Give a cache its row slot and one slot per entry of ``slot_layers``.

    Args:
        cache: A dynamic, static or offloaded cache made for the base; extended once.
        num_layers: Layers of the base.
        slot_layers: The base layer whose cache type each slot takes, ``FULL_ATTENTION`` or
            ``MEMORY``.

    Raises:
        UsageError: The cache cannot hold exact states (quantized, or of an unknown type).
    """
    if isinstance(cache, QuantizedCache):
        raise UsageError(
            "a quantized cache rounds the states that a graft decodes from; "
            "use cache_implementation='dynamic', 'static' or 'offloaded' for rows with images."
        )
    grows = cache.layer_class_to_replicate
    if grows is not None:
        if grows is not DynamicLayer:
            raise UsageError(
                f"a cache of {grows.__name__} cannot hold a graft's slots; use DynamicCache()."
            )
        while len(cache.layers) < num_layers:
            cache.layers.append(grows())
        if len(cache.layers) == num_layers:
            cache.layers.append(RowLayer())
        missing = slot_layers[len(cache.layers) - num_layers - 1 :]
        if MEMORY in missing:  # or the cache makes them when they are first written to
            cache.layers += [MemoryLayer() if one == MEMORY else grows() for one in missing]
            _link(cache)
        return
    wanted = num_layers + 1 + len(slot_layers)
    if len(cache.layers) > num_layers:
        if len(cache.layers) < wanted:
            raise UsageError(
                "this cache was made before a workflow was added; begin with a fresh cache."
            )
        return
    cache.layers.append(RowLayer())
    own = {FULL_ATTENTION: PreallocatedLayer, MEMORY: MemoryLayer}
    for index in slot_layers:
        cache.layers.append(own[index]() if index in own else _like(cache.layers[index]))
    _link(cache)


def _link(cache: Cache) -> None:
    """Tell slots that are never fetched which one is, behind them and around."""
    for layer, after in zip(cache.layers, [*cache.layers[1:], cache.layers[0]], strict=True):
        if isinstance(layer, MemoryLayer):
            layer.after = after


def _like(layer: Any) -> CacheLayerMixin:
    """Return an empty cache layer of the same type and size."""
    kind = type(layer)
    sizes = {"sliding_window": getattr(layer, "max_cache_len", None), **vars(layer)}
    wanted = inspect.signature(kind.__init__).parameters.values()
    named = [one.name for one in wanted if one.kind is one.POSITIONAL_OR_KEYWORD][1:]
    known = kind.__module__.startswith("transformers.") and keeps_keys(layer)
    if not known or not set(named) <= sizes.keys():
        raise UsageError(
            f"a cache layer of type {kind.__name__} cannot be given to an inserted layer; "
            "use a dynamic, static or offloaded cache."
        )
    copy = kind(**{name: sizes[name] for name in named})
    vars(copy).update({key: sizes[key] for key in ("record_past",) if key in vars(copy)})
    return copy


class _Resident(DynamicLayer):
    """A cache layer that is small, and stays where it is when a cache is offloaded."""

    def offload(self) -> None:
        pass

    def prefetch(self) -> None:
        pass


class RowLayer(_Resident):
    """The cache layer of a row slot.

    Attributes:
        written: The keys as they were written last, and the workflow numbers in them: what the host
            knows need not be read from a card.
        went_on: Whether rows of text went on with an image, so that numbers differ by position.
        any_image: Whether an image position was written; cutting positions off leaves it.
    """

    written: tuple[Tensor | None, list[int]] = (None, [])
    went_on: bool = False
    any_image: bool = False


class MemoryLayer(_Resident):
    """A cache layer of images beside the sequence, written once an image.

    Keys and values are ``(b, n, T, d)``, as long as the row with the most needs them.

    Attributes:
        owner: The image of its row that each is of, ``(b, T)``, counted from 1; 0 at padding.
        after: The slot that is used after it, which an offloaded cache fetches in its stead.
    """

    owner: Tensor
    after: Any

    def append(self, keys: Tensor, values: Tensor, owner: Tensor, before: Tensor) -> None:
        """Write new images.

        Args:
            keys: ``(b, n, K, d)``.
            values: Likewise.
            owner: ``(b, K)``.
            before: Images that each row has had, ``(b,)``: of later ones, whose positions were cut
                off since, nothing is left.
        """
        if self.is_initialized:
            kept = torch.where(self.owner > before[:, None], 0, self.owner)
            owner = torch.cat([kept, owner], dim=1)
        self.update(keys, values)
        self.owner = owner

    def prefetch(self) -> None:
        self.after.prefetch()

    def crop(self, tokens_to_remove: int) -> None:
        """Leave all as it is: no position of the sequence stands here."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self._choose(lambda owner: owner.index_select(0, beam_idx.to(owner.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._choose(lambda owner: owner.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._choose(lambda owner: owner[indices])

    def _choose(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.owner = rows(self.owner)


class RowSlot:
    """The cache slot that remembers kinds, positions and workflows of the rows."""

    def __init__(self, cache: Cache | None, index: int) -> None:
        self.cache, self.index = cache, index

    @property
    def _layer(self) -> Any:
        assert self.cache is not None
        return self.cache.layers[self.index]

    @property
    def filled(self) -> bool:
        """Return whether a workflow has written to the cache."""
        if self.cache is None or len(self.cache.layers) <= self.index:
            return False
        layer = self._layer
        return bool(layer.is_initialized and layer.keys is not None and layer.keys.numel())

    @property
    def past(self) -> int:
        """Positions in the cache."""
        try:
            return 0 if self.cache is None else int(self.cache.get_seq_length())
        except ValueError:  # running states alone, before there is a row slot
            return 0

    def workflows(self) -> list[int]:
        """Workflow number of every row at its last position, as written."""
        layer = self._layer
        keys, numbers = layer.written
        if keys is layer.keys:
            return list(numbers)
        if len(set(numbers)) == 1 and not layer.went_on:  # rows in another order, repeated, fewer
            return [numbers[0]] * layer.keys.shape[0]
        return layer.keys[:, 0, -1, 0].tolist()

    def spared(self) -> Tensor | int:
        """Return how many numbers fewer than positions each row has used so far, ``(b, 1)``."""
        if not self.filled:
            return 0
        kinds, positions = self._layer.values[:, 0].unbind(-1)  # (b, S) each
        real = kinds != PADDING
        last = positions.masked_fill(~real, -1).amax(1)
        return (real.sum(1) - 1 - last)[:, None]

    def write(
        self, kinds: Tensor, positions: Tensor, workflows: Sequence[int], image: bool
    ) -> tuple[Tensor, Tensor, bool]:
        """Append new positions.

        Args:
            kinds: Token types ``(b, s)``.
            positions: ``(b, s)``.
            workflows: Number of each row's.
            image: Whether one of the new positions is an image's.

        Returns:
            Kinds and positions of all so far, ``(b, S)`` each, and whether one is an image's.
        """
        if self.cache is None:
            return kinds, positions, image
        layer = self._layer
        if self.filled and self.workflows() == list(workflows):
            keys = layer.keys[:, :, -1:].to(kinds.device)
        else:
            layer.went_on = layer.went_on or self.past > 0
            keys = torch.tensor(workflows, device=kinds.device)[:, None, None, None]
        keys = keys.expand(-1, 1, kinds.shape[1], 1)
        values = torch.stack([kinds, positions], dim=-1)[:, None]  # (b, 1, s, 2)
        _, both = self.cache.update(keys, values, self.index)
        layer.written, layer.any_image = (layer.keys, list(workflows)), layer.any_image or image
        return both[:, 0, :, 0], both[:, 0, :, 1], layer.any_image


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
