"""Activation functions computed again in the backward pass, instead of being kept for it.

A gated feed-forward keeps the gate, the activation of the gate and the other factor, each of the
intermediate width: in a frozen Llama layer about two thirds of all that training keeps. The
activation is a cheap function of the gate, which its own backward pass keeps anyway.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from mmgraft.patching import patched_forward

#: Activations of one operation, whose own backward pass keeps what they were given.
KEEPS_ITS_INPUT = (nn.SiLU, nn.GELU, SiLUActivation, GELUActivation, GELUTanh)


@contextmanager
def activations_again(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep nothing of what these modules' activation functions give, while the block lasts.

    The backward pass calls the function on the same numbers, so its gradients are the same to the
    bit. Tensors are recognised by their storage while the activation's result is in use: another
    tensor cannot have it then. Where something else handles what is kept (such as
    ``torch.autograd.graph.save_on_cpu``), it does so and this does nothing.

    Args:
        modules: Whose activation functions: decoder layers and inserted ones.
    """
    if _is_handled():
        yield
        return
    made = _Made()
    with ExitStack() as stack:
        for module in modules:
            for part in module.modules():
                if isinstance(part, KEEPS_ITS_INPUT) and not getattr(part, "inplace", False):
                    stack.enter_context(patched_forward(part, made.run))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(made.pack, _unpack))
        yield


@dataclass
class _Again:
    """Recipe for a tensor that was not kept."""

    function: Callable[[Tensor], Tensor]
    given: Tensor
    shape: torch.Size

    def make(self) -> Tensor:
        return self.function(self.given).view(self.shape)


class _Made:
    """Outputs of activation functions, as long as they are in use."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], partial[_Again]]] = {}

    def run(self, original: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        out = original(given)
        if out.requires_grad and out.is_contiguous():
            again = partial(_Again, original, given.detach())
            self._known[_storage(out)] = weakref.ref(out), again
        return out

    def pack(self, tensor: Tensor) -> Any:
        reference, again = self._known.get(_storage(tensor), (None, None))
        out = None if reference is None else reference()
        if out is None or again is None or not _same_numbers(tensor, out):
            return tensor
        return again(tensor.shape)


def _is_handled() -> bool:
    autograd = getattr(torch._C, "_autograd", None)
    top = getattr(autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(False) is not None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same_numbers(tensor: Tensor, out: Tensor) -> bool:
    """Tell whether ``tensor`` is all of ``out``, perhaps in another shape."""
    return (
        tensor.dtype == out.dtype
        and tensor.numel() == out.numel()
        and tensor.is_contiguous()
        and tensor._version == out._version == 0
    )


def _unpack(kept: Any) -> Tensor:
    return kept.make() if isinstance(kept, _Again) else kept
