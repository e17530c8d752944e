"""IAA: whole decoder layers inserted after chosen layers of a frozen base (arXiv 2408.12902)."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mmgraft.anatomy import Anatomy
from mmgraft.grafts.base import BaseParts, Graft, Pass
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.layers import parse_layers


class IAAGraft(Graft):
    """Inserted layers ``phi'_k`` with an own embedding, norm and head, each optional.

    With ``X^i`` the hidden states into base layer ``i`` and ``phi_i`` the layer:

    - structure ``c``: ``X^{i+1} = phi'_k(phi_i(X^i))`` (the paper's final one);
    - structure ``b``: ``X^{i+1} = phi_i(X^i) + G_k(phi'_k(phi_i(X^i)))``;
    - structure ``a``: ``c_k = phi'_k(c_{k-1} + X^i)``, ``X^{i+1} = phi_i(X^i) + G_k(c_k)``.

    ``a`` and ``b`` are our reconstruction of the paper's prose; their gates ``G_k`` start at zero.

    Args:
        config: Which layers, which structure, which own modules.
        anatomy: The base.
        parts: Copies of the base's modules to start from.
    """

    method = "iaa"

    def __init__(self, config: IAAConfig, anatomy: Anatomy, parts: BaseParts) -> None:
        super().__init__(config, anatomy)
        self.layer_indices = parse_layers(config.layers, anatomy.num_layers)
        self.layers = nn.ModuleList([parts.layer(index) for index in self.layer_indices])
        self._inserted_at = {index: k for k, index in enumerate(self.layer_indices)}
        if config.structure in ("a", "b"):
            self.gates = nn.ModuleList([_Gate(config.gate, anatomy) for _ in self.layer_indices])
        self.embedding = parts.embedding() if config.embedding else None
        self.norm = parts.norm() if config.norm else None
        self.head = parts.head() if config.head else None
        self.tied = (
            bool(anatomy.tied and self.embedding is not None and self.head is not None)
            and not config.untie
        )
        self.tie()

    def tie(self) -> None:
        """Make embedding and head one tensor where the base ties them, and two where not."""
        if self.embedding is None or self.head is None:
            return
        shared = self.head.weight is self.embedding.weight
        if self.tied:
            self.head.weight = self.embedding.weight
        elif shared:
            self.head.weight = nn.Parameter(cast(Tensor, self.head.weight).detach().clone())

    def shares(self) -> set[str]:
        return {"head.weight"} if self.tied else set()

    def slot_layers(self) -> list[int]:
        return list(self.layer_indices)

    def assign_slots(self, first: int) -> None:
        for k, layer in enumerate(self.layers):
            for module in layer.modules():
                for name in self.anatomy.layer_numbers & vars(module).keys():
                    setattr(module, name, first + k)

    def acts_on(self, index: int) -> bool:
        return index in self._inserted_at

    def after_layer(
        self,
        index: int,
        call: Callable[[nn.Module, Tensor], Tensor],
        hidden_in: Tensor,
        hidden_out: Tensor,
        state: Pass,
        carry: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        k = self._inserted_at.get(index)
        if k is None:
            return hidden_out, carry
        inserted = self.layers[k]
        if self.config.structure == "c":
            return call(inserted, hidden_out), None
        if self.config.structure == "b":
            return hidden_out + self.gates[k](call(inserted, hidden_out)), None
        control = call(inserted, hidden_in if carry is None else carry + hidden_in)  # (b, s, h)
        return hidden_out + self.gates[k](control), control

    def ends_with(self, index: int) -> nn.Module | None:
        k = self._inserted_at.get(index)
        return None if k is None else self.layers[k]

    def groups(self) -> dict[str, Iterable[nn.Parameter]]:
        layers = list(self.layers.parameters())
        if self.config.structure != "c":
            layers += list(self.gates.parameters())
        found: dict[str, Iterable[nn.Parameter]] = {"layers": layers}
        for name in ("embedding", "norm", "head"):
            module = getattr(self, name)
            if module is not None:
                found[name] = list(module.parameters())
        return found

    def layer_modules(self) -> Sequence[tuple[int, nn.Module]]:
        pairs = list(zip(self.layer_indices, self.layers, strict=True))
        if self.config.structure != "c":
            pairs += list(zip(self.layer_indices, self.gates, strict=True))
        return pairs


class _Gate(nn.Module):
    """Zero-initialised gate ``G``: a linear layer ``h -> h`` or one scalar."""

    def __init__(self, kind: str, anatomy: Anatomy) -> None:
        super().__init__()
        size = anatomy.hidden_size
        self.linear = nn.Linear(size, size, bias=False) if kind == "linear" else None
        if self.linear is None:
            self.scale = nn.Parameter(torch.zeros(1))
        else:
            nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype) if self.linear is None else self.linear(x)
