"""The visual expert: at image positions other weights do the work of the base's linear layers.

``y = W x`` at text, ``y = W' x`` at image positions; attention joins both, norms are the base's.
``W'`` is a copy of ``W`` with its bias, or ``W + B A``. No new position is an image's while a text
is decoded: then nothing is patched.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mmgraft.anatomy import Anatomy
from mmgraft.errors import UsageError
from mmgraft.grafts import base, computing, on_linears
from mmgraft.grafts.expert.config import ExpertConfig


class ExpertGraft(on_linears.OnLinears):
    """Experts of linear layers of chosen base layers, each under its linear layer's name:
    ``feedforward.0.mlp.down_proj.weight``.
    """

    method = "expert"

    def __init__(self, config: ExpertConfig, anatomy: Anatomy, parts: base.BaseParts) -> None:
        def make(sizes: on_linears.Sizes) -> dict[str, nn.Module]:
            if config.rank is not None:
                return {name: on_linears.Adapter(size, config.rank) for name, size in sizes.items()}
            found = parts.modules([f"{anatomy.layers_path}.{name}" for name in sizes])
            return dict(zip(sizes, found, strict=True))

        if config.image_positions == "shared" and not _by_number(anatomy):
            raise UsageError(
                f"image_positions: shared gives all of an image one position, and "
                f"{anatomy.class_name} takes none (neither rotary ones nor a table). Choose each."
            )
        super().__init__(config, anatomy, config.parts, "--parts", make, tokens=True)

    @property
    def shares_positions(self) -> bool:
        return self.active and self.config.image_positions == "shared"

    def check_attention(self, implementation: str) -> None:
        if self.config.image_positions == "shared" and computing.is_flash(implementation):
            raise UsageError(
                f"{implementation} reads the position that an image shares as the beginning of a "
                "new row; load the base with attention sdpa, or choose image_positions: each."
            )

    def instead(
        self, module: nn.Module, state: base.Pass, chosen: Tensor | None, original: Any, x: Tensor
    ) -> Tensor:
        """Return what a linear layer gives, with the expert's in its place at image positions.

        The base multiplies all positions, and image positions are written over: no bit of a text
        position changes. Where gradients flow it multiplies text positions alone, which spares its
        part of both passes and rounds otherwise.
        """
        if isinstance(module, on_linears.Adapter):
            return super().instead(module, state, chosen, original, x)
        assert chosen is not None
        flat = on_linears.by_position(x, state)
        own = module(flat.index_select(0, chosen))
        if torch.is_grad_enabled() and x.requires_grad:
            rest, back = self._split(state, chosen)
            out = original(flat.index_select(0, rest))
            both = torch.cat([out, own.to(out.dtype)])
            return both.index_select(0, back).view(*x.shape[:-1], -1)
        out = original(x)
        return out.flatten(0, -2).index_copy(0, chosen, own.to(out.dtype)).view(out.shape)

    def _split(self, state: base.Pass, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return numbers of the positions that are not chosen, and where each stands in the row of
        these and the chosen ones.
        """
        key = f"split of {id(self)}"
        if key not in state.shared:
            others = torch.ones_like(state.kinds).flatten().index_fill(0, chosen, 0)
            order = others.argsort(descending=True, stable=True)
            rest = order[: len(order) - len(chosen)]
            state.shared[key] = rest, order.argsort()
        return state.shared[key]


def _by_number(anatomy: Anatomy) -> bool:
    """Tell whether a base reads the positions that it is given: with ALiBi it counts distances."""
    numbered = anatomy.rope_theta is not None or anatomy.position_table is not None
    return anatomy.takes_positions and numbered
