"""Small grafts that reach into a layer's feed-forward, as other people's methods do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmgraft.grafts import IMAGE, Graft, LowRank, Pass, Promises, patched_forward, select


class _Inside(Graft):
    promises = Promises()

    def __init__(self, config: Any, anatomy: Any, parts: Any = None) -> None:
        super().__init__(config, anatomy, parts)
        size = anatomy.hidden_size
        self.parts = nn.ModuleDict(
            {str(index): LowRank(size, 4) for index in range(anatomy.num_layers)}
        )

    def acts_on(self, index: int) -> bool:
        return True

    def layer_modules(self) -> list[tuple[int, nn.Module]]:
        return [(int(index), part) for index, part in self.parts.items()]


class RowGatedLora(_Inside):
    """A LoRA on the last linear layer of the feed-forward, for rows that see."""

    method = "row-gated-lora"

    @contextmanager
    def layer_context(
        self, index: int, layer: nn.Module, hidden: Tensor, state: Pass, gate: Tensor | None
    ) -> Iterator[None]:
        part = self.parts[str(index)]

        def both(original: Any, x: Tensor) -> Tensor:
            added = part(x[..., : self.anatomy.hidden_size])
            return original(x) + select(gate, added, torch.zeros_like(added))

        with patched_forward(layer.mlp.down_proj, both):  # type: ignore[union-attr]
            yield


class PositionGatedExpert(_Inside):
    """Another feed-forward at image positions, beside the first linear layers'."""

    method = "position-gated-expert"

    @contextmanager
    def layer_context(
        self, index: int, layer: nn.Module, hidden: Tensor, state: Pass, gate: Tensor | None
    ) -> Iterator[None]:
        part, here = self.parts[str(index)], (state.kinds == IMAGE)[..., None]

        def expert(original: Any, x: Tensor) -> Tensor:
            added = part(x)
            out = original(x)
            wide = torch.nn.functional.pad(added, (0, out.shape[-1] - added.shape[-1]))
            return out + torch.where(here, wide, 0.0) + 0.1 * added.mean(-1, keepdim=True)

        with ExitStack() as stack:
            stack.enter_context(patched_forward(layer.mlp.up_proj, expert))  # type: ignore[union-attr]
            yield
