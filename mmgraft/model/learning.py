"""The loss of a batch: which positions count, through which heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mmgraft.anatomy import decoder_layers, get_path
from mmgraft.errors import UsageError
from mmgraft.model.forward import Active
from mmgraft.model.generation import WorkflowGeneration
from mmgraft.model.kernels.compiling import is_compiled
from mmgraft.model.last_layer import fed_at, last_layer
from mmgraft.model.loss import chunked_loss, supervised
from mmgraft.model.rows import Rows
from mmgraft.model.workflow import TEXT_WORKFLOW


class WorkflowLoss(WorkflowGeneration):
    """Part of :class:`GraftedModel`: from last hidden states and labels to a number."""

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        rows: Rows,
        active: list[Active],
        num_items: Tensor | int | None,
    ) -> Tensor:
        """Mean cross-entropy (nats) over the supervised tokens of rows that train something."""
        if self.anatomy.logits_blocked is not None:
            raise UsageError(
                f"this base cannot be trained or scored with labels: {self.anatomy.logits_blocked}."
            )
        mask = self._learned(labels, rows).to(hidden.device)
        targets = labels.roll(-1, dims=1).to(hidden.device)
        total = hidden.new_zeros((), dtype=torch.float32)
        for head, gate in self._heads(active):
            part = mask if gate is None else mask & gate.to(mask.device)[:, None]
            at = part.flatten().nonzero().squeeze(1)  # a card is waited for once; by a mask, twice
            total = total + chunked_loss(
                hidden.flatten(0, 1).index_select(0, at),
                targets.flatten().index_select(0, at),
                head,
                self.anatomy.vocab_size,
            )
        count = mask.sum() if num_items is None else num_items
        count = count.to(total.device) if isinstance(count, Tensor) else count
        return (
            total / max(count, 1) if not isinstance(count, Tensor) else total / count.clamp(min=1)
        )

    def _learned(self, labels: Tensor, rows: Rows) -> Tensor:
        """Positions whose logits the loss reads, ``(b, s)``."""
        mask = supervised(labels)
        if self.training and not self.base_is_trained and TEXT_WORKFLOW in rows.names:
            learns = torch.tensor([name != TEXT_WORKFLOW for name in rows.names])
            mask = mask & learns.to(mask.device)[:, None]
        return mask

    def _last_layer(
        self, active: Sequence[Active], labels: Tensor, rows: Rows, checkpointing: bool
    ) -> AbstractContextManager[Any]:
        """A context in which the last layer does at learned positions alone what it can."""
        if checkpointing or is_compiled(self.base, self.anatomy):
            return nullcontext()
        layers = decoder_layers(self.base, self.anatomy)
        last = last_layer(list(layers), [(item.graft, item.gate) for item in active])
        return nullcontext() if last is None else fed_at(last, self._learned(labels, rows))

    def _heads(self, active: list[Active]) -> Iterator[tuple[Any, Tensor | None]]:
        """Heads (hidden to logits) and the rows that use them."""
        base_head = get_path(self.base, self.anatomy.head_path)
        own = [a for a in active if a.graft.head is not None and a.graft.active]
        if len(own) == 1 and own[0].gate is None:
            yield self._logits_of(own[0].graft.head), None
            return
        rest: Tensor | None = None
        for item in own:
            yield self._logits_of(item.graft.head), item.gate
            rest = ~item.gate if rest is None else rest & ~item.gate  # type: ignore[operator]
        yield self._logits_of(base_head), rest

    def _logits_of(self, head: nn.Module | None) -> Any:
        """A head followed by what the base does to its logits (scale, soft-cap)."""
        anatomy = self.anatomy

        def logits(hidden: Tensor) -> Tensor:
            out = head(hidden) * anatomy.logit_scale  # type: ignore[misc]
            if anatomy.logit_softcap is not None:
                out = torch.tanh(out / anatomy.logit_softcap) * anatomy.logit_softcap
            return out

        return logits
