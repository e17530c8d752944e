"""Memory of one process: its optimizer, and its share where several train together.

These are counts by what each way does, worked out by hand in its tests; none was compared with a
measured peak.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from mmgraft.anatomy import decoder_layers
from mmgraft.model.modeling import GraftedModel
from mmgraft.recipes.recipe import Optimizer, Parallel
from mmgraft.training.distributed.sharding import pieces_at
from mmgraft.training.memory.stand_in import weights_of

_WHOLE = 4096  # bitsandbytes keeps the state of smaller tensors in 32 bits
_PAGED = 100_000  # and pages only that of larger ones
_BLOCK = 256  # moments that share an fp32 constant


@dataclass(frozen=True)
class Groups:
    """Tensors that FSDP2 gathers together.

    Attributes:
        layer: Bytes of the largest decoder layer with what grafts run there.
        rest: Bytes of all that is in no layer: embeddings, norm, head, projector.
        trained: Trained numbers in the group that has most of them.
    """

    layer: int
    rest: int
    trained: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """Bytes of one process.

    Attributes:
        weights: Of base, graft and projector that it keeps all the time, by dtype; ``nf4`` with its
            constants.
        gradients: That it keeps of what is trained, in fp32.
        optimizer: Its state.
        scratch: Of the optimizer's step.
        gathered: Weights of other processes that are whole here while they are computed with.
        passing: Gradients that are whole on their way to the others.
    """

    weights: dict[str, int]
    gradients: int
    optimizer: int
    scratch: int
    gathered: int = 0
    passing: int = 0


def groups_of(model: GraftedModel) -> Groups:
    """Divide a model as FSDP2 does in :mod:`mmgraft.training.distributed.sharding`."""
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


def whole_share(model: GraftedModel, optimizer: Optimizer, device: str) -> Share:
    """Count what a process holds of a model that it trains alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return Share(
        weights=weights_of(model),
        gradients=sum(4 * p.numel() for p in trained),
        optimizer=state_bytes(model, trained, optimizer, device),
        scratch=scratch_bytes(trained, optimizer, device),
    )


def share(whole: Share, groups: Groups, way: Parallel, processes: int) -> Share:
    """Count what one process holds of a model.

    Args:
        whole: What it would hold alone.
        groups: What is gathered together.
        way: The recipe's ``parallel``.
        processes: How many share it; one holds everything.
    """
    if processes == 1 or way == "ddp":
        return whole

    def part(size: int) -> int:
        return -(-size // processes)

    # The rest stays whole from its forward to its backward; one layer runs, one is on its way.
    # Gradients of two groups: one is computed, one is being summed over all processes.
    return Share(
        weights={name: part(size) for name, size in whole.weights.items()},
        gradients=part(whole.gradients),
        optimizer=part(whole.optimizer),
        scratch=part(whole.scratch),
        gathered=min(groups.rest + 2 * groups.layer, sum(whole.weights.values())),
        passing=min(2 * 4 * groups.trained, whole.gradients),
    )


def state_bytes(
    model: nn.Module, trained: Iterable[nn.Parameter], optimizer: Optimizer, device: str
) -> int:
    """Count the bytes of both moments on the device where the parameters are.

    AdamW keeps two fp32 numbers for each; in 8 bits one byte each and a constant for 256, where
    embeddings and tensors under 4096 numbers keep fp32. Pages on CUDA lie in main memory.
    """
    if optimizer == "adamw":
        return sum(8 * parameter.numel() for parameter in trained)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    paged = optimizer == "paged_adamw_8bit" and device == "cuda"
    total = 0
    for parameter in trained:
        size = parameter.numel()
        if paged and size >= _PAGED:
            continue
        whole = id(parameter) in tables or size < _WHOLE
        total += 8 * size if whole else 2 * size + 2 * 4 * -(-size // _BLOCK)
    return total


def scratch_bytes(trained: Iterable[nn.Parameter], optimizer: Optimizer, device: str) -> int:
    """Count what a step holds beside the state: two copies of a parameter's second moments.

    On CUDA one kernel does all of the step, and holds nothing.
    """
    if optimizer != "adamw" or device == "cuda":
        return 0
    return 2 * max((4 * parameter.numel() for parameter in trained), default=0)
