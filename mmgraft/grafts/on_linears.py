"""Grafts on the base's own linear layers: which ones, where their modules are kept, what runs.

A linear layer runs patched while its decoder layer does. What the base's own product gives at
positions that are not chosen is never touched: no bit of it changes.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmgraft.anatomy import Anatomy
from mmgraft.errors import UsageError
from mmgraft.grafts.base import IMAGE, Graft, Pass
from mmgraft.layers import parse_layers
from mmgraft.patching import patched_forward

#: Widths of what goes in and comes out, by layer and dotted name: ``0.self_attn.q_proj``.
Sizes = Mapping[str, tuple[int, int]]


def chosen_linears(
    anatomy: Anatomy, layers: Any, parts: Collection[str], option: str
) -> dict[str, Sizes]:
    """Return the linear layers of chosen base layers, by ``attention`` and ``feedforward``.

    Args:
        anatomy: The base's.
        layers: As a config names them.
        parts: Which of the two are wanted.
        option: The option that says so, for the error.

    Raises:
        UsageError: A layer has none of what is wanted.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {part: {} for part in parts}
    for index in parse_layers(layers, anatomy.num_layers):
        before = sum(map(len, found.values()))
        for name, size in anatomy.linears[index].items():
            inside = name.startswith(f"{anatomy.attention_name}.")
            part = "attention" if inside else "feedforward"
            if part in found:
                found[part][f"{index}.{name}"] = size
        if sum(map(len, found.values())) == before:
            has = [i for i, names in anatomy.linears.items() if names]
            raise UsageError(
                f"layer {index} of {anatomy.class_name} has no linear layer of its own in its "
                f"{' or '.join(parts)}: experts of a mixture take tokens out of their rows, where "
                f"nothing finds them. Choose {option} attention, or --layers among "
                f"{', '.join(map(str, has))}."
            )
    return dict(found)


class Adapter(nn.Module):
    """``scale B A x``: ``A`` Kaiming uniform, as torch makes it, ``B`` zero at the start."""

    def __init__(
        self, size: tuple[int, int], rank: int, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(size[0], rank, bias=False)
        self.up = nn.Linear(rank, size[1], bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.scale * self.down(self.dropout(x)))


class OnLinears(Graft):
    """Modules of its own for linear layers of chosen base layers, kept under their names:
    ``attention.0.self_attn.q_proj``.

    Args:
        config: The method's settings, with ``layers`` and ``rank`` (of adapters, or None).
        anatomy: The base.
        parts: Which of ``attention`` and ``feedforward``.
        option: The option that chooses them.
        make: Gives the modules of linear layers, by the same names.
        tokens: Only image positions are chosen, not all of a row that runs the graft.
    """

    def __init__(
        self,
        config: Any,
        anatomy: Anatomy,
        parts: Collection[str],
        option: str,
        make: Callable[[Sizes], Mapping[str, nn.Module]],
        tokens: bool,
    ) -> None:
        super().__init__(config, anatomy)
        if (config.rank or 0) > anatomy.hidden_size:
            raise UsageError(
                f"rank {config.rank} is above the width {anatomy.hidden_size} of the layers, "
                "and no linear layer of the base has a higher one: give a lower --rank."
            )
        self._tokens = tokens
        self.attention, self.feedforward = nn.Module(), nn.Module()
        self._modules_at: dict[int, dict[str, nn.Module]] = {}
        chosen = chosen_linears(anatomy, config.layers, parts, option)
        made = make({name: size for sizes in chosen.values() for name, size in sizes.items()})
        for part, sizes in chosen.items():
            for path in sizes:
                _put(self.get_submodule(part), path, made[path])
                index, _, name = path.partition(".")
                self._modules_at.setdefault(int(index), {})[name] = made[path]

    def acts_on(self, index: int) -> bool:
        return index in self._modules_at

    @contextmanager
    def layer_context(
        self, index: int, layer: nn.Module, hidden: Tensor, state: Pass, gate: Tensor | None
    ) -> Iterator[None]:
        """Run the base layer with its linear layers patched."""
        if self._tokens and not state.new_image:
            yield
            return
        chosen = self._chosen(state, gate)
        with ExitStack() as stack:
            for name, module in self._modules_at[index].items():
                patch = partial(self.instead, module, state, chosen)
                stack.enter_context(patched_forward(layer.get_submodule(name), patch))
            yield

    def instead(
        self, module: nn.Module, state: Pass, chosen: Tensor | None, original: Any, x: Tensor
    ) -> Tensor:
        """Return what a linear layer gives, with the module's added at the chosen positions."""
        out = original(x)
        if chosen is None:
            return out + module(x).to(out.dtype)
        added = module(by_position(x, state).index_select(0, chosen)).to(out.dtype)
        return out.flatten(0, -2).index_add(0, chosen, added).view(out.shape)

    def _chosen(self, state: Pass, gate: Tensor | None) -> Tensor | None:
        """Return numbers of the chosen positions, counted through the batch; None for all."""
        if gate is None and not self._tokens:
            return None
        key = f"positions of {id(self)}"  # found once, and moved from card to card
        if key not in state.shared:
            chosen = state.kinds == IMAGE if self._tokens else torch.ones_like(state.kinds).bool()
            if gate is not None:
                chosen = chosen & gate.to(chosen.device)[:, None]
            state.shared[key] = chosen.flatten().nonzero().squeeze(1)
        return state.shared[key]

    def changes_feed_forward(self, index: int) -> bool:
        return str(index) in self.feedforward._modules

    def groups(self) -> dict[str, Iterable[nn.Parameter]]:
        parts = {"attention": self.attention, "feedforward": self.feedforward}
        return {name: list(part.parameters()) for name, part in parts.items() if part._modules}

    def layer_modules(self) -> Sequence[tuple[int, nn.Module]]:
        pairs = [*self.attention.named_children(), *self.feedforward.named_children()]
        return [(int(index), modules) for index, modules in pairs]


def by_position(x: Tensor, state: Pass) -> Tensor:
    """Return what a linear layer is given, ``(b s, h)``, where it is given each position once.

    Raises:
        UsageError: It is not, so that nobody can tell which of them are an image's.
    """
    flat = x.flatten(0, -2)
    if len(flat) != state.kinds.numel():
        raise UsageError(
            f"a linear layer is given {len(flat)} vectors where there are {state.kinds.numel()} "
            "positions: leave its layer or part out."
        )
    return flat


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module under a dotted name, with modules that hold nothing else between."""
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, module)
