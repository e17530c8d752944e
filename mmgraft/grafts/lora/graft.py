"""LoRA behind a gate: adapters on the base's own linear layers, never merged into them.

``y = W x + (alpha / r) B A x`` where the gate is open, ``y = W x`` elsewhere. ``W x`` is the
base's own product of all positions, and what is added is computed for the chosen positions alone:
at all others no bit of it changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmgraft.anatomy import Anatomy
from mmgraft.errors import UsageError
from mmgraft.grafts.base import IMAGE, BaseParts, Graft, Pass
from mmgraft.grafts.lora.config import LoraConfig, chosen_linears
from mmgraft.layers import parse_layers
from mmgraft.patching import patched_forward


class Adapter(nn.Module):
    """``(alpha / r) B A x``: ``A`` Kaiming uniform, as torch makes it, ``B`` zero at the start."""

    def __init__(self, size: tuple[int, int], config: LoraConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.dropout = nn.Dropout(config.dropout)
        self.down = nn.Linear(size[0], config.rank, bias=False)
        self.up = nn.Linear(config.rank, size[1], bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.scale * self.down(self.dropout(x)))


class LoraGraft(Graft):
    """Adapters on the linear layers of chosen base layers.

    A layer's adapters are kept under the names of its linear layers:
    ``attention.0.self_attn.q_proj.down.weight``.
    """

    method = "lora"

    def __init__(self, config: LoraConfig, anatomy: Anatomy, parts: BaseParts | None) -> None:
        super().__init__(config, anatomy)
        if config.rank > anatomy.hidden_size:
            raise UsageError(
                f"rank {config.rank} is above the width {anatomy.hidden_size} of the base's "
                "layers, and no linear layer in them has a higher rank than that: give a lower "
                "--rank."
            )
        self.attention, self.feedforward = nn.ModuleDict(), nn.ModuleDict()
        self._adapters: dict[int, dict[str, Adapter]] = {}
        for index in parse_layers(config.layers, anatomy.num_layers):
            self._adapters[index] = {}
            for group, sizes in chosen_linears(config, anatomy, index).items():
                made = {name: Adapter(size, config) for name, size in sizes.items()}
                self._adapters[index].update(made)
                if made:
                    self.get_submodule(group).add_module(str(index), _tree(made))

    def acts_on(self, index: int) -> bool:
        return index in self._adapters

    @contextmanager
    def layer_context(
        self, index: int, layer: nn.Module, hidden: Tensor, state: Pass, gate: Tensor | None
    ) -> Iterator[None]:
        """Run the base layer with its linear layers adapted."""
        if self.config.gate == "token" and not state.new_image:
            yield
            return
        chosen = self._chosen(state, gate)
        with ExitStack() as stack:
            for name, adapter in self._adapters[index].items():
                adapted = partial(_adapted, adapter, chosen)
                stack.enter_context(patched_forward(layer.get_submodule(name), adapted))
            yield

    def _chosen(self, state: Pass, gate: Tensor | None) -> Tensor | None:
        """Return numbers of the positions behind an open gate, counted through the batch; None
        for all of them.
        """
        token = self.config.gate == "token"
        if gate is None and not token:
            return None
        key = f"positions with adapters, {id(self)}"  # found once, and moved from card to card
        if key not in state.shared:
            chosen = state.kinds == IMAGE if token else torch.ones_like(state.kinds).bool()
            if gate is not None:
                chosen = chosen & gate.to(chosen.device)[:, None]
            state.shared[key] = chosen.flatten().nonzero().squeeze(1)
        return state.shared[key]

    def changes_feed_forward(self, index: int) -> bool:
        return str(index) in self.feedforward

    def groups(self) -> dict[str, Iterable[nn.Parameter]]:
        parts = {"attention": self.attention, "feedforward": self.feedforward}
        return {name: list(part.parameters()) for name, part in parts.items() if len(part)}

    def layer_modules(self) -> Sequence[tuple[int, nn.Module]]:
        pairs = [*self.attention.items(), *self.feedforward.items()]
        return [(int(index), adapters) for index, adapters in pairs]


def _adapted(
    adapter: Adapter, chosen: Tensor | None, original: Any, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Return what a linear layer gives, with the adapter's at the chosen positions."""
    out = original(x, *args, **kwargs)
    if chosen is None:
        return out + adapter(x).to(out.dtype)
    added = adapter(x.flatten(0, -2).index_select(0, chosen)).to(out.dtype)
    return out.flatten(0, -2).index_add(0, chosen, added).view(out.shape)


def _tree(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a module that holds others under dotted names."""
    root = nn.Module()
    for path, module in modules.items():
        owner, (*parents, leaf) = root, path.split(".")
        for name in parents:
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.add_module(leaf, module)
    return root
