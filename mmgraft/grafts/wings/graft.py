"""Wings: visual and textual learners beside the attention (arXiv 2406.03496, equations 3 to 5)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmgraft.anatomy import Anatomy
from mmgraft.errors import UsageError
from mmgraft.grafts.base import FULL_ATTENTION, IMAGE, BaseParts, Graft, Pass, select
from mmgraft.grafts.computing import is_flash
from mmgraft.grafts.method import StageSwitches
from mmgraft.grafts.wings import learners as beside
from mmgraft.grafts.wings.config import WingsConfig, WingsStage
from mmgraft.grafts.wings.router import Router, route
from mmgraft.layers import parse_layers
from mmgraft.patching import patched_forward

_FALLBACK_LENGTH = 4096  # for bases that name no maximum length (Bloom)


class WingsLayer(nn.Module):
    """The learners and the router of one layer.

    Attributes:
        stacked: Copies of their matrices, while tokens are decoded.
    """

    stacked: beside.Stacked | None = None

    def __init__(self, config: WingsConfig, anatomy: Anatomy, heads: int, length: int) -> None:
        super().__init__()
        for name in config.learners:
            self.add_module(name, beside.Learner(anatomy.hidden_size, config.rank, heads))
        if config.routed:
            self.router = Router(length)


class WingsGraft(Graft):
    """``Att = Att_main + router_V Learner_V + router_T Learner_T`` at every chosen layer.

    Attributes:
        running: The learners that act now: stage 1 runs the visual one alone, with weight 1.
    """

    method = "wings"

    def __init__(self, config: WingsConfig, anatomy: Anatomy, parts: BaseParts | None) -> None:
        super().__init__(config, anatomy)
        self.heads = beside.learner_heads(anatomy, config.heads)
        self.length = config.max_length or anatomy.max_positions or _FALLBACK_LENGTH
        self.layer_indices = parse_layers(config.layers, anatomy.num_layers)
        self.layers = nn.ModuleDict(
            {
                str(i): WingsLayer(config, anatomy, self.heads, self.length)
                for i in self.layer_indices
            }
        )
        self.running: tuple[str, ...] = tuple(config.learners)
        self._first_slot = 0

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

    def switch(self, switches: StageSwitches) -> None:
        stage = switches if isinstance(switches, WingsStage) else WingsStage()
        self.set_state({"learners": stage.learners or self.config.learners})
        both, routed = len(self.running) == 2, self.config.routed
        if stage.router and not (both and routed):
            raise UsageError(
                "has router: true, but "
                + ("one learner has nothing to weigh" if not both else "this graft has no router")
                + "; write router: false"
            )
        if stage.router is False and both and routed:
            raise UsageError(
                "has router: false, but this graft's router weighs its two learners; write "
                "router: true, or learners: [visual]"
            )

    def changes_feed_forward(self, index: int) -> bool:
        return False

    def slot_layers(self) -> list[int]:
        return [FULL_ATTENTION] * len(self.layer_indices)

    def assign_slots(self, first: int) -> None:
        self._first_slot = first

    def acts_on(self, index: int) -> bool:
        return str(index) in self.layers

    def begin(self, state: Pass) -> None:
        """From the first position on, each learner reads the keys of its own kind alone."""
        if state.start == 0:
            self._forget_stacked()
        if state.start == 0 and self.watch is None:
            for name in self.running:
                state.pack(beside.KIND_OF[name])

    def check_length(self, length: int) -> None:
        if self.config.routed and length > self.length:
            raise UsageError(
                f"a row has {length} positions, but this graft's router knows {self.length}: "
                "shorten the row, or graft again with a larger --max-length."
            )

    def check_attention(self, implementation: str) -> None:
        if self.config.routed and self.anatomy.explicit_weights and is_flash(implementation):
            raise UsageError(
                f"the router of Wings needs the attention weights of {self.anatomy.model_type}, "
                f"and {implementation} does not give them: write attention: eager "
                "(attn_implementation='eager')."
            )

    @contextmanager
    def layer_context(
        self, index: int, layer: nn.Module, hidden: Tensor, state: Pass, gate: Tensor | None
    ) -> Iterator[None]:
        wing: WingsLayer = self.layers[str(index)]  # type: ignore[assignment]
        attention: Any = layer.get_submodule(self.anatomy.attention_name)
        first_key = _first_key(state, index)
        added: list[Tensor] = []

        def attend(original: Any, *args: Any, **kwargs: Any) -> Any:
            if hasattr(wing, "router") and len(self.running) == 2:
                columns = partial(_columns, wing.router, state, first_key)
                fused = self.anatomy.explicit_weights is None  # else it may have no config at all
                fused = fused and attention.config._attn_implementation != "eager"
                out, logits = route(original, attention, columns, fused, args, kwargs)
                shares = logits.softmax(-1)  # (b, s, 2): visual, textual
            else:
                out, shares = original(*args, **kwargs), None
            extra = self._learned(wing, index, hidden, state, shares)
            if self.anatomy.residual_scale != 1.0:
                extra = extra / self.anatomy.residual_scale
            if self.anatomy.branch_norm is not None:
                added.append(extra)
                return out
            if isinstance(out, tuple):
                return (with_extra(out[0], extra), *out[1:])
            return with_extra(out, extra)

        def with_extra(x: Tensor, extra: Tensor) -> Tensor:  # rows of others are not touched
            return select(gate, x + extra.to(x.dtype), x)

        def after_norm(original: Any, x: Tensor) -> Tensor:
            normed = original(x)
            return with_extra(normed, added.pop()) if added else normed

        with patched_forward(attention, attend):
            if self.anatomy.branch_norm is None:
                yield
                return
            with patched_forward(layer.get_submodule(self.anatomy.branch_norm), after_norm):
                yield

    def _learned(
        self, wing: WingsLayer, index: int, hidden: Tensor, state: Pass, shares: Tensor | None
    ) -> Tensor:
        """Return the routed sum of the learners at one layer, ``(b, s, h)``."""
        inputs, remember = hidden.to(state.features.dtype), None
        if state.cache is not None:
            slot = self._first_slot + self.layer_indices.index(index)
            remember = partial(state.cache.update, layer_idx=slot)
            if (stacked := self._stacked(wing, hidden, state)) is not None:
                return beside.read_token(stacked, inputs, state, remember, shares)
        learners, queries = self._learners(wing, self.running), {}
        for name, learner in learners.items():
            kind = beside.KIND_OF[name]
            if kind in state.packed or (not state.packed and (kind != IMAGE or state.any_image)):
                queries[name] = learner.queries(inputs)
        show: Any = self.watch
        watch: Any = None
        if show is not None:

            def shown(name: str, q: Tensor, k: Tensor, mask: Tensor, seen: Tensor) -> None:
                show(index, q, k, mask, seen, _share(shares, name))

            watch = shown
        if state.packed:
            lowered = beside.read_packed(learners, queries, state, remember)
        else:
            lowered = beside.read_all(learners, queries, state, remember, watch)
        total: Tensor | None = None
        for name, low in zip(queries, lowered, strict=True):  # each (b, s, r)
            share = _share(shares, name)
            out = learners[name].lift(low if share is None else share[..., None].to(low) * low)
            total = out if total is None else total + out
        return torch.zeros_like(hidden) if total is None else total

    def _learners(self, wing: WingsLayer, names: Iterable[str]) -> dict[str, beside.Learner]:
        return {name: cast(beside.Learner, wing.get_submodule(name)) for name in names}

    def _stacked(self, wing: WingsLayer, hidden: Tensor, state: Pass) -> beside.Stacked | None:
        """Return the matrices for a single text token that is decoded; None for other passes."""
        of_text = state.start > 0 and hidden.shape[1] == 1 and not state.new_image
        if not of_text or self.watch is not None:
            return None
        names = [n for n in self.running if beside.KIND_OF[n] != IMAGE or state.any_image]
        if self.training or torch.is_grad_enabled() or not names:
            return None
        (seen,) = self._learners(wing, self.running[-1:]).values()
        if wing.stacked is None or not wing.stacked.serves(names, seen.output.up.weight):
            wing.stacked = beside.Stacked.of(self._learners(wing, names), seen)
        return wing.stacked

    def _forget_stacked(self) -> None:
        for wing in self.layers.values():
            wing.stacked = None  # type: ignore[assignment]

    def train(self, mode: bool = True) -> "WingsGraft":
        self._forget_stacked()
        return super().train(mode)

    def groups(self) -> dict[str, Iterable[nn.Parameter]]:
        found: dict[str, list[nn.Parameter]] = {}
        for wing in self.layers.values():
            for name in self.config.learners:
                learner = list(wing.get_submodule(name).parameters())
                found.setdefault("learners", []).extend(learner)
                found.setdefault(f"learners.{name}", []).extend(learner)
            if hasattr(wing, "router"):
                found.setdefault("router", []).extend(wing.get_submodule("router").parameters())
        return dict(found)

    def layer_modules(self) -> Sequence[tuple[int, nn.Module]]:
        return [(int(index), wing) for index, wing in self.layers.items()]


def _first_key(state: Pass, index: int) -> int:
    """Column of the first key that the base's attention sees at a layer (sliding windows move)."""
    if state.cache is None:
        return 0
    return int(state.cache.get_mask_sizes(state.kinds.shape[1], index)[1])


def _columns(router: Router, state: Pass, first: int, count: int) -> Tensor:
    """Return the router's columns for ``count`` keys from a column on, ``(b, count, 2)``."""
    key = ("router's positions", first, count)
    positions = state.shared.get(key)
    if positions is None:
        positions = state.key_positions[:, first : first + count].clamp(min=0)  # (b, <= count)
        missing = count - positions.shape[1]  # a static cache has keys that nothing was written to
        positions = F.pad(positions, (0, missing)) if missing else positions
        if state.start:  # a token is decoded: all layers share them
            state.shared[key] = positions
    return router.columns(positions)


def _share(shares: Tensor | None, name: str) -> Tensor | None:
    """One learner's share of every query ``(b, s)``; None for 1."""
    return None if shares is None else shares[..., 0 if name == "visual" else 1]
