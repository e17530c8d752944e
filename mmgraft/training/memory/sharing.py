"""What one of several processes holds, by the way in which they share a training.

These are counts by what each way does, worked out by hand in its tests; none was compared with a
measured peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmgraft.anatomy import decoder_layers
from mmgraft.training.distributed.sharding import pieces_at
from mmgraft.training.memory.stand_in import weights_of

if TYPE_CHECKING:
    from mmgraft.model.modeling import GraftedModel
    from mmgraft.recipes.recipe import Parallel

_BUCKET = 500_000_000
"""Numbers in a bucket of DeepSpeed, which the shipped configurations leave as it is; in fp32."""
_LIVE = 1_000_000_000
"""Parameters that ZeRO 3 holds whole at once at most, likewise."""


@dataclass(frozen=True)
class Groups:
    """What FSDP2 gathers together.

    Attributes:
        layer: Bytes of the largest decoder layer with what grafts run there.
        rest: Bytes of all that is in no layer: embeddings, norm, head, projector.
        trained: Trained numbers in the group that has most of them.
    """

    layer: int
    rest: int
    trained: int


@dataclass(frozen=True)
class Share:
    """Bytes of one process.

    Attributes:
        weights: That it keeps all the time, by dtype.
        gathered: Weights that are whole for as long as they are computed with, beside these.
        gradients: That it keeps.
        optimizer: Its state.
        scratch: Of the optimizer's step.
        buffers: Held all the time to exchange gradients, and fp32 copies of what is trained.
        passing: Gradients that are whole on their way to the others.
    """

    weights: dict[str, int]
    gathered: int
    gradients: int
    optimizer: int
    scratch: int
    buffers: int
    passing: int


def groups_of(model: GraftedModel) -> Groups:
    """How FSDP2 would divide a model, as `mmgraft.training.distributed.sharding` does."""
    whole = sum(weights_of(model).values())
    sizes: list[int] = []
    trained: list[int] = []
    for index, layer in enumerate(decoder_layers(model.base, model.anatomy)):
        parts = [layer, *pieces_at(model, index)]
        sizes.append(sum(sum(weights_of(part).values()) for part in parts))
        trained.append(
            sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)
        )
    every = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Groups(max(sizes), whole - sum(sizes), max(*trained, every - sum(trained)))


def share(
    way: Parallel,
    processes: int,
    *,
    weights: Mapping[str, int],
    parameters: int,
    trained: int,
    optimizer: int,
    scratch: int,
    groups: Groups,
) -> Share:
    """What one process holds of a model.

    Args:
        way: The recipe's `parallel`.
        processes: How many share it; one holds everything.
        weights: Bytes of base, graft and projector, by dtype.
        parameters: Numbers in them.
        trained: Of these, how many are trained.
        optimizer: Bytes of its whole state.
        scratch: Of a step of the whole.
        groups: What is gathered together.
    """

    def part(size: int) -> int:
        return -(-size // processes)

    gradients = 4 * trained
    if processes == 1 or way == "ddp":
        buckets = gradients if processes > 1 else 0  # DDP's copies of all gradients
        return Share(dict(weights), 0, gradients, optimizer, scratch, buckets, 0)
    pieces = {name: part(size) for name, size in weights.items()}
    whole = sum(weights.values())
    if way == "fsdp2":
        # The rest stays whole from its forward to its backward; one layer runs, one is on its way.
        # Gradients of two groups: one is computed, one is being summed over all processes.
        gathered = min(groups.rest + 2 * groups.layer, whole)
        passing = min(2 * 4 * groups.trained, gradients)
        return Share(pieces, gathered, part(gradients), part(optimizer), part(scratch), 0, passing)
    own = part(gradients)  # an fp32 copy of its part of what is trained
    if way == "zero2":
        return Share(
            dict(weights), 0, part(gradients), part(optimizer), part(scratch),
            2 * 4 * _BUCKET + own, 0,
        )  # fmt: skip
    live = min(whole - sum(pieces.values()), _LIVE * whole // max(1, parameters))
    return Share(
        pieces, max(0, live), part(gradients), part(optimizer), part(scratch), 4 * _BUCKET + own, 0
    )
