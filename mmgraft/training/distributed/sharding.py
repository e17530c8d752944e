"""FSDP2: the grafted model in pieces over all processes, by a wrapping plan of its own.

A decoder layer and what grafts run at it are one group: its parameters are gathered before the
layer runs and given up after it, forwards and backwards. That is where the patched forward of a
layer stands (``model/forward.py``), so the grafts' parts are whole whenever they are called,
however they are called: torch's hooks are on the layer, and a part may have no call of its own to
hang them on. Everything else (embeddings, last norm, head, projector) is the model's own group. The
frozen vision tower stays whole: it also works between steps, for one process alone.

accelerate's FSDP plugin knows none of this, and on a CPU it trains with DDP without a word.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmgraft.anatomy import decoder_layers
from mmgraft.errors import MMGraftError
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.sharded import gathered, is_piece, like


def shard(model: GraftedModel, device: str) -> None:
    """Spread a model over all processes; each of its parts then runs in every pass.

    Call it when the process group stands and when it is settled what trains; all processes must
    hold the same weights. From here on the trained parameters are other objects, ``DTensor``.

    Args:
        model: In main memory, or on the device.
        device: ``cuda`` or ``cpu``.

    Raises:
        MMGraftError: A trained parameter is in no group, which only a defect can cause.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    whole: set[nn.Parameter] = set()
    if model.vision_tower is not None:
        model.vision_tower.to(mesh.device_type)
        whole.update(model.vision_tower.parameters())
    done: set[nn.Parameter] = set()
    for index, layer in enumerate(decoder_layers(model.base, model.anatomy)):
        pieces = pieces_at(model, index)
        with _within(layer, pieces):
            fully_shard(layer, mesh=mesh)
        done.update(parameter for piece in pieces for parameter in piece.parameters())
    fully_shard(model, mesh=mesh, ignored_params=whole | done)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not is_piece(parameter):
            raise MMGraftError(f"{name} is trained, but it is in one piece; train without fsdp2")
    model.in_step = True
    vars(model)["_is_accelerate_prepared"] = True  # or accelerate would put DDP around it


def is_sharded(model: nn.Module) -> bool:
    """Tell whether :func:`shard` has spread the model."""
    return bool(getattr(model, "in_step", False))


def whole_norm(norm: Any) -> Any:
    """Return a gradient's norm, over all processes where each knows its part of it."""
    return norm.full_tensor() if isinstance(norm, Tensor) and is_piece(norm) else norm  # type: ignore[attr-defined]


def rest(model: nn.Module) -> None:
    """Give up whole tensors that a pass without gradients has left, so that pieces are seen."""
    for module in model.modules():
        if hasattr(module, "reshard") and is_sharded(model):
            module.reshard()  # type: ignore[operator]


def whole_state(optimizer: Any, keep: bool) -> dict[str, Any]:
    """Gather an optimizer's state dict with whole tensors; all processes call this together.

    Args:
        optimizer: Of sharded parameters.
        keep: False gives an empty dict.
    """
    given = optimizer.state_dict()
    state: dict[int, Any] = {}
    for number, values in given["state"].items():
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        state[number] = {**values, **gathered(tensors, keep)}
    return {**given, "state": state} if keep else {}


def pieces_of_state(optimizer: Any) -> None:
    """Take an optimizer's state, read whole from a checkpoint, into the parameters' pieces."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                state[name] = value if is_piece(value) else like(value, parameter)


def pieces_at(model: GraftedModel, index: int) -> list[nn.Module]:
    """List what the grafts run at a layer."""
    workflows: Sequence[Any] = list(model.workflows.values())
    return [
        piece
        for workflow in workflows
        for layer, piece in workflow.graft.layer_modules()
        if layer == index
    ]


@contextmanager
def _within(layer: nn.Module, pieces: Sequence[nn.Module]) -> Iterator[None]:
    """Make pieces of grafts children of the layer that they run at, while the block lasts."""
    names = [f"_mmgraft_piece_{number}" for number in range(len(pieces))]
    for name, piece in zip(names, pieces, strict=True):
        layer.add_module(name, piece)
    try:
        yield
    finally:
        for name in names:
            del layer._modules[name]
