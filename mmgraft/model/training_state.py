"""What of a grafted model is trained, and in which precision and mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mmgraft.errors import UsageError
from mmgraft.model.core import GraftedCore

BASE_GROUP = "base"


class TrainingState(GraftedCore):
    """Part of :class:`GraftedModel`: freezing, fp32 masters, and frozen modules in eval mode."""

    def train(self, mode: bool = True) -> Self:
        """Training mode for the parts that are trained; frozen ones stay in eval mode."""
        nn.Module.train(self, False)
        if mode:
            self.training = True
            for part in self._parts():
                if any(parameter.requires_grad for parameter in part.parameters()):
                    part.train(True)
        return self

    def _parts(self) -> Iterable[nn.Module]:
        yield self.base
        for workflow in self._workflow_list():
            yield workflow.projector
            yield from workflow.graft.children()

    @property
    def base_is_trained(self) -> bool:
        """Whether any weight of the base is trained; text then is no longer the base's."""
        return any(parameter.requires_grad for parameter in self.base.parameters())

    def groups(self, workflow: str | None = None) -> dict[str, list[nn.Parameter]]:
        """Parameters by group name: ``projector``, ``graft``, the graft's own groups, ``base``."""
        found = self.workflow(workflow).groups()
        return {**found, BASE_GROUP: list(self.base.parameters())}

    def set_trainable(self, groups: Sequence[str], workflow: str | None = None) -> list[str]:
        """Train exactly these groups, with fp32 parameters, and freeze the rest.

        Args:
            groups: Names from :meth:`groups`. A group that this graft does not have (an embedding
                that it shares with the base) is refused.
            workflow: Whose groups; default: the first.

        Returns:
            Names of the trained parameters.

        Raises:
            UsageError: An unknown group, a method that may not be trained, or ``base`` in 4-bit.
        """
        known = self.groups(workflow)
        for name in groups:
            if name not in known:
                raise UsageError(
                    f"this graft has no parameters called {name!r}; it has: "
                    f"{', '.join(sorted(n for n, p in known.items() if p))}."
                )
        chosen = self.workflow(workflow).graft
        if chosen.promises.training:
            raise UsageError(f"{chosen.method} is not trained: {chosen.promises.training}.")
        if BASE_GROUP in groups and self.quantized:
            raise UsageError(
                "a base in 4-bit cannot be trained: its weights are rounded. Load it without "
                "quantization, or keep it frozen and train the graft."
            )
        self.requires_grad_(False)
        for name in groups:
            for parameter in known[name]:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        for workflow_ in self._workflow_list():
            workflow_.graft.tie()
        self.train(self.training)
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    @property
    def quantized(self) -> bool:
        """Whether the base is held in 4-bit."""
        return bool(getattr(self.base, "is_quantized", False))

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute each decoder layer, with the graft's part of it, in the backward pass."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self.gradient_checkpointing = False

    def touch(self) -> Tensor:
        """A zero that depends on every trained parameter, so that every rank has all gradients."""
        total = torch.zeros((), device=self.device)
        for parameter in self.parameters():
            if parameter.requires_grad:
                total = total + parameter.flatten()[0].float().to(total.device) * 0
        return total
