"""A model that several processes hold in pieces: its whole tensors, and steps taken together.

Every piece is gathered from all processes before it runs, and its gradients are handed out to all
of them afterwards. A process whose rows leave a part out (no image, so no projector) would leave
the others waiting. So every part runs in every pass, for no row where no row wants it (a gate that
is false everywhere), and what cannot run for no row is joined here: it gets a gradient of zeros at
its turn.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmgraft.model.workflow import Workflow


def is_piece(tensor: Tensor) -> bool:
    """Tell whether this process holds a part of the tensor (a ``DTensor``)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gathered(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Gather tensors by name, whole and in main memory where they were in pieces.

    All processes must call this together, with the same names in the same order. They are gathered
    one by one, so that a process that keeps none never holds more than one.

    Args:
        tensors: Those that are whole stay where and what they are.
        keep: False gives an empty dict.
    """
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            whole = _whole(tensor)
            seen[id(tensor)] = whole if keep else tensor
        if keep:
            found[name] = seen[id(tensor)]
    return found


def like(whole: Tensor, other: Tensor) -> Tensor:
    """Split a whole tensor that every process has into the same pieces as another."""
    if not is_piece(other):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    moved = whole.to(other.device)
    return distribute_tensor(moved, other.device_mesh, other.placements, src_data_rank=None)


def _whole(tensor: Tensor) -> Tensor:
    plain = tensor.detach()
    if is_piece(plain):
        return plain.full_tensor().cpu()  # type: ignore[attr-defined]
    return plain


def join(x: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """``x`` itself, which the backward pass reaches all ``parameters`` through.

    A parameter that has a gradient by then keeps it as it is; the others get zeros, without a look
    at their values. So nothing changes, but that none is without a gradient.

    Args:
        x: Any tensor; where it is used, so must the parameters have been.
        parameters: Those that require no gradient are left out.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not wanted or not torch.is_grad_enabled():
        return x
    return cast(Tensor, _Joined.apply(x, *wanted))


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (
            grads[0],
            *(
                None if one.is_leaf and one.grad is not None else torch.zeros_like(one)
                for one in ctx.parameters
            ),
        )


def outside_layers(workflows: Iterable[Workflow]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """List parameters of workflows that stand before the layers, and those of their heads.

    A head shares its tensor with an embedding where the base ties them; such a tensor is the
    head's.
    """
    before: dict[int, nn.Parameter] = {}
    heads: dict[int, nn.Parameter] = {}
    inside: set[int] = set()
    for workflow in workflows:
        graft = workflow.graft
        if graft.head is not None:
            heads.update((id(p), p) for p in graft.head.parameters())
        inside.update(id(p) for _, piece in graft.layer_modules() for p in piece.parameters())
        before.update((id(p), p) for p in workflow.parameters())
    first = [p for key, p in before.items() if key not in inside and key not in heads]
    return first, list(heads.values())
