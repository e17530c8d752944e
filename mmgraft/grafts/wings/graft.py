"""Wings: visual and textual learners beside the attention (arXiv 2406.03496, equations 3 to 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmgraft.anatomy import Anatomy
from mmgraft.errors import UsageError
from mmgraft.grafts.base import (
    FULL_ATTENTION,
    IMAGE,
    TEXT,
    BaseParts,
    Graft,
    Packed,
    Pass,
    select,
)
from mmgraft.grafts.wings.config import WingsConfig
from mmgraft.grafts.wings.learners import Learner, attend, learner_heads, rotation_of
from mmgraft.grafts.wings.router import Router, route
from mmgraft.layers import parse_layers
from mmgraft.patching import patched_forward

_KIND_OF = {"visual": IMAGE, "textual": TEXT}
_FALLBACK_LENGTH = 4096  # for bases that name no maximum length (Bloom)


class WingsLayer(nn.Module):
    """The learners and the router of one layer."""

    def __init__(self, config: WingsConfig, anatomy: Anatomy, heads: int, length: int) -> None:
        super().__init__()
        for name in config.learners:
            self.add_module(name, Learner(anatomy.hidden_size, config.rank, heads))
        if config.routed:
            self.router = Router(length)

    def learner(self, name: str) -> Learner:
        """The learner called ``visual`` or ``textual``."""
        return self.get_submodule(name)  # type: ignore[return-value]


class WingsGraft(Graft):
    """``Att = Att_main + router_V Learner_V + router_T Learner_T`` at every chosen layer.

    Attributes:
        running: The learners that act now: stage 1 runs the visual one alone, with weight 1.
        watch: Told of every learner's attention, for measurements: base layer, queries and keys
            ``(b, heads, s, d)``, the mask, the queries that see a key ``(b, s, 1)``, and the
            router's share ``(b, s)`` or None for 1.
    """

    method = "wings"
    watch: Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor | None], None] | None = None

    def __init__(self, config: WingsConfig, anatomy: Anatomy, parts: BaseParts | None) -> None:
        super().__init__(config, anatomy)
        if anatomy.branch_blocked is not None:
            raise UsageError(
                f"Wings cannot add its learners to this base: {anatomy.branch_blocked}. "
                "Choose --method iaa or llava."
            )
        if anatomy.embedding_size != anatomy.hidden_size:
            raise UsageError(
                f"{anatomy.model_type} embeds tokens in {anatomy.embedding_size} numbers but its "
                f"layers have {anatomy.hidden_size}: Wings' learners need both the same. "
                "Choose --method iaa or llava for this base."
            )
        self.heads = learner_heads(anatomy, config.heads)
        self.length = config.max_length or anatomy.max_positions or _FALLBACK_LENGTH
        self.places = parse_layers(config.layers, anatomy.num_layers)
        self.layers = nn.ModuleDict(
            {str(i): WingsLayer(config, anatomy, self.heads, self.length) for i in self.places}
        )
        self.running: tuple[str, ...] = tuple(config.learners)
        self._first_slot = 0

    @classmethod
    def build(cls, config: WingsConfig, anatomy: Anatomy, parts: BaseParts | None) -> Graft:
        if config.variant == "official":
            from mmgraft.grafts.wings.official_graft import OfficialWingsGraft

            return OfficialWingsGraft(config, anatomy, parts)
        return cls(config, anatomy, parts)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "learners": list(self.running)}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        wanted = list(state.get("learners", self.running))
        missing = sorted(set(wanted) - set(self.config.learners))
        if missing or not wanted:
            raise UsageError(
                f"this graft has the learners {', '.join(self.config.learners)}; "
                f"it cannot run {', '.join(missing) or 'none'}."
            )
        self.running = tuple(name for name in ("visual", "textual") if name in wanted)

    def slot_layers(self) -> list[int]:
        return [FULL_ATTENTION] * len(self.places)

    def assign_slots(self, first: int) -> None:
        self._first_slot = first

    def acts_on(self, index: int) -> bool:
        return str(index) in self.layers

    def begin(self, state: Pass) -> None:
        """From the first position on, each learner reads the keys of its own kind alone."""
        if state.start == 0 and self.watch is None:
            for name in self.running:
                state.pack(_KIND_OF[name])

    def check_length(self, length: int) -> None:
        if self.config.routed and length > self.length:
            raise UsageError(
                f"a row has {length} positions, but this graft's router knows {self.length}: "
                "shorten the row, or graft again with a larger --max-length."
            )

    @contextmanager
    def layer_context(
        self, index: int, layer: nn.Module, hidden: Tensor, state: Pass, gate: Tensor | None
    ) -> Iterator[None]:
        wing: WingsLayer = self.layers[str(index)]  # type: ignore[assignment]
        attention = layer.get_submodule(self.anatomy.attention_name)
        first_key = _first_key(state, index, attention)
        added: list[Tensor] = []

        def attend(original: Any, *args: Any, **kwargs: Any) -> Any:
            if hasattr(wing, "router") and len(self.running) == 2:
                columns = partial(_columns, wing.router, state, first_key)
                fused = self.anatomy.explicit_router is None and _fusible(attention)
                out, logits = route(original, attention, columns, fused, args, kwargs)
                shares = logits.softmax(-1)  # (b, s, 2): visual, textual
            else:
                out, shares = original(*args, **kwargs), None
            extra = self._learned(wing, index, hidden, state, shares)
            extra = select(gate, extra, torch.zeros((), dtype=extra.dtype, device=extra.device))
            extra = extra / self.anatomy.residual_scale
            if self.anatomy.branch_norm is not None:
                added.append(extra)
                return out
            return _add(out, extra)

        def after_norm(original: Any, x: Tensor) -> Tensor:
            normed = original(x)
            return normed + added.pop().to(normed.dtype) if added else normed

        with patched_forward(attention, attend):
            if self.anatomy.branch_norm is None:
                yield
                return
            with patched_forward(layer.get_submodule(self.anatomy.branch_norm), after_norm):
                yield

    def _learned(
        self, wing: WingsLayer, index: int, hidden: Tensor, state: Pass, shares: Tensor | None
    ) -> Tensor:
        """The routed sum of the learners at one layer, ``(b, s, h)``."""
        size, inner = hidden.shape[-1] // self.heads, hidden.to(state.features.dtype)
        rotation = rotation_of(state, size)
        names = [n for n in self.running if n != "visual" or state.any_image]
        if state.packed:
            names = [n for n in names if _KIND_OF[n] in state.packed]
        queries = [wing.learner(name).queries(inner, rotation) for name in names]
        read = self._read_packed if state.packed else self._read_all
        mixed = read(wing, index, state, names, queries, shares)  # each (b, heads, s, d)
        total = torch.zeros_like(hidden)
        for name, values in zip(names, mixed, strict=True):
            kind = _KIND_OF[name]
            seen = state.packed[kind].seen if state.packed else state.visible(kind)[1]
            out = wing.learner(name).finish(values, seen)
            share = _share(shares, name)
            total = total + (out if share is None else share[..., None].to(out.dtype) * out)
        return total

    def _read_packed(
        self,
        wing: WingsLayer,
        index: int,
        state: Pass,
        names: list[str],
        queries: list[Tensor],
        shares: Tensor | None,
    ) -> list[Tensor]:
        """Values ``(b, heads, s, d)`` for each learner's queries, from keys of its own kind."""
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        mixed = []
        for name, query in zip(names, queries, strict=True):
            packed = state.packed[_KIND_OF[name]]
            rotation = rotation_of(state, query.shape[-1], _KIND_OF[name])
            pairs[name] = wing.learner(name).keys_values(packed.features, rotation)
            mixed.append(attend(query, *pairs[name], packed.mask))
        if state.cache is not None and pairs:
            spread = {
                name: tuple(_spread(state.packed[_KIND_OF[name]], part, state) for part in pair)
                for name, pair in pairs.items()
            }
            keys, values = _by_kind(spread.get("visual"), spread.get("textual"), state)
            self._remember(index, state, keys, values)
        return mixed

    def _read_all(
        self,
        wing: WingsLayer,
        index: int,
        state: Pass,
        names: list[str],
        queries: list[Tensor],
        shares: Tensor | None,
    ) -> list[Tensor]:
        """The same from keys of all positions so far: one reading of them serves both learners."""
        rotation = rotation_of(state, self.anatomy.hidden_size // self.heads)
        visual = textual = None
        if "visual" in self.running and (state.new_image or "textual" not in self.running):
            visual = wing.learner("visual").keys_values(state.features, rotation)
        if "textual" in self.running:
            textual = wing.learner("textual").keys_values(state.features, rotation)
        keys, values = _by_kind(visual, textual, state)
        if state.cache is not None:
            keys, values = self._remember(index, state, keys, values)
        if not names:
            return []
        masks = [state.visible(_KIND_OF[name]) for name in names]
        if self.watch is not None:
            for name, query, (mask, seen) in zip(names, queries, masks, strict=True):
                self.watch(index, query, keys.to(query.dtype), mask, seen, _share(shares, name))
        together = ("masks", *names)
        if together not in state.shared:
            state.shared[together] = torch.cat([mask for mask, _ in masks], dim=2)
        mixed = attend(torch.cat(queries, dim=2), keys, values, state.shared[together])
        return list(mixed.chunk(len(names), dim=2))

    def _remember(
        self, index: int, state: Pass, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put new keys and values into the layer's slot; gives those of all positions so far."""
        return state.cache.update(keys, values, self._first_slot + self.places.index(index))

    def groups(self) -> dict[str, Iterable[nn.Parameter]]:
        found: dict[str, list[nn.Parameter]] = {}
        for wing in self.layers.values():
            for name in self.config.learners:
                learner = wing.get_submodule(name)
                found.setdefault(f"learners.{name}", []).extend(learner.parameters())
            if hasattr(wing, "router"):
                found.setdefault("router", []).extend(wing.get_submodule("router").parameters())
        return dict(found)

    def layer_modules(self) -> Sequence[tuple[int, nn.Module]]:
        return [(int(index), wing) for index, wing in self.layers.items()]


def _fusible(attention: nn.Module) -> bool:
    """Whether the attention runs a registered kernel now (eager already returns its weights)."""
    return attention.config._attn_implementation != "eager"  # type: ignore[union-attr]


def _first_key(state: Pass, index: int, attention: nn.Module) -> int:
    """Column of the first key that the base's attention sees at a layer (sliding windows move)."""
    if state.cache is None:
        return 0
    return int(state.cache.get_mask_sizes(state.kinds.shape[1], index)[1])


def _columns(router: Router, state: Pass, first: int, count: int) -> Tensor:
    """The router's columns for ``count`` keys from column ``first`` on, ``(b, count, 2)``."""
    positions = state.key_positions[:, first : first + count]  # (b, <= count)
    missing = count - positions.shape[1]  # a static cache has keys that nothing was written to
    if missing:
        positions = torch.nn.functional.pad(positions, (0, missing))
    return router.columns(positions)


def _share(shares: Tensor | None, name: str) -> Tensor | None:
    """One learner's share of every query ``(b, s)``; None for 1."""
    return None if shares is None else shares[..., 0 if name == "visual" else 1]


def _by_kind(
    visual: tuple[Tensor, ...] | None, textual: tuple[Tensor, ...] | None, state: Pass
) -> tuple[Tensor, Tensor]:
    """Keys and values ``(b, heads, s, d)`` of each position by its own kind's learner."""
    if visual is not None and textual is not None:
        image = (state.kinds == IMAGE)[:, None, :, None]
        keys, values = (torch.where(image, v, t) for v, t in zip(visual, textual, strict=True))
    else:
        keys, values = visual or textual or ()
    return keys, values


def _spread(packed: Packed, part: Tensor, state: Pass) -> Tensor:
    """Packed keys or values ``(b, heads, K, d)`` at their columns, ``(b, heads, s, d)``."""
    everywhere = part.new_zeros(*part.shape[:2], state.kinds.shape[1], part.shape[3])
    return everywhere.scatter(2, packed.columns[:, None, :, None].expand_as(part), part)


def _add(out: Any, extra: Tensor) -> Any:
    if isinstance(out, tuple):
        return (out[0] + extra.to(out[0].dtype), *out[1:])
    return out + extra.to(out.dtype)
