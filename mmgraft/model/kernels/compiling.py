"""Decoder layers through torch.compile while a stage trains."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mmgraft.anatomy import Anatomy, decoder_layers
from mmgraft.errors import UsageError
from mmgraft.grafts.base import Graft
from mmgraft.patching import patched_forward


@contextmanager
def compiled_layers(
    base: PreTrainedModel, anatomy: Anatomy, grafts: Sequence[Graft], **options: Any
) -> Iterator[None]:
    """Run the base's decoder layers and inserted ones compiled, while the block lasts.

    The block holds forward and backward passes, as layers may be computed again in the latter.
    Compiled is what a layer does when it first runs; layers of one class share what is compiled. A
    layer that a graft reaches into stays as it is.

    Args:
        base: Whose layers.
        anatomy: The base's.
        grafts: Those that may run.
        **options: For ``torch.compile``.

    Raises:
        UsageError: No layer is left to compile.
    """
    chosen = check_compiled(base, anatomy, grafts)
    kind = type(chosen[0])
    chosen += [
        part for graft in grafts for _, part in graft.layer_modules() if isinstance(part, kind)
    ]
    with ExitStack() as stack:
        for layer in chosen:
            made = torch.compile(layer.forward, **options)
            stack.enter_context(patched_forward(layer, partial(_instead, made)))
        yield


def check_compiled(
    base: PreTrainedModel, anatomy: Anatomy, grafts: Sequence[Graft]
) -> list[nn.Module]:
    """Find the base's layers that :func:`compiled_layers` compiles.

    Raises:
        UsageError: No layer is left to compile.
    """
    layers = decoder_layers(base, anatomy)
    chosen = [layer for index, layer in enumerate(layers) if not _reached(grafts, index)]
    if not chosen:
        raise UsageError(
            "compile: true finds no layer to compile: a part of the graft stands inside every "
            "layer. Leave compile out, or graft fewer layers (--layers every:4)."
        )
    return chosen


def is_compiled(base: PreTrainedModel, anatomy: Anatomy) -> bool:
    """Tell whether layers of the base run compiled now."""
    patches = (layer.__dict__.get("forward") for layer in decoder_layers(base, anatomy))
    return any(getattr(patch, "func", None) is _instead for patch in patches)


def _instead(made: Callable[..., Any], _: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return made(*args, **kwargs)


def _reached(grafts: Sequence[Graft], index: int) -> bool:
    """Tell whether a graft changes what a layer does inside."""
    return any(
        type(graft).layer_context is not Graft.layer_context and graft.acts_on(index)
        for graft in grafts
    )
