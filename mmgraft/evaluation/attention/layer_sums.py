"""Attention of one batch by layer and side, with the graft out of the path and in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmgraft.anatomy import Anatomy, decoder_layers
from mmgraft.evaluation.attention.attention_sums import AttentionSums
from mmgraft.grafts.base import IMAGE, PADDING, TEXT, Graft
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.rows import kinds_of

SIDES = ("before", "image", "after")
PROJECTOR_ONLY = "base_with_projector"
"""The series in which the workflow runs and its graft does not: the base, fed with images."""

INSERTED = "+"
"""After a layer's number: the layer that a graft inserted after it."""
_WATCHED = "beside "
"""Before a layer's number: what a graft attends to beside that layer's attention."""


@dataclass(frozen=True)
class LayerSums:
    """Attention of some samples by layer and side.

    Attributes:
        layers: Names, in the order in which the layers run: "3", and "3+" for one inserted after 3.
        sums: ``(samples, layers, 3)``, the sides as in :data:`SIDES`.
    """

    layers: tuple[str, ...]
    sums: np.ndarray


def side_columns(kinds: Tensor) -> Tensor:
    """Return which position stands where, ``(b, s) -> (b, s, 3)`` of false and true.

    Of a row with several images, text between the first and the last belongs to no side.
    """
    image = kinds == IMAGE
    begun = image.cumsum(dim=1) > 0  # an image here or earlier
    to_come = image.flip(1).cumsum(dim=1).flip(1) > 0
    text = kinds == TEXT
    return torch.stack([text & to_come & ~begun, image, text & begun & ~to_come], dim=-1)


@torch.no_grad()
def layer_sums(
    model: GraftedModel, inputs: Mapping[str, Tensor], workflow: str | None = None
) -> dict[str, LayerSums]:
    """Sum the attention of one batch, with the graft out of the path and in it.

    Args:
        model: In eval mode.
        inputs: Of its forward, rows padded on the right; every row has an image.
        workflow: Of all rows; default: the model's.

    Returns:
        By series. ``base_with_projector`` comes first, and is all for a graft that does nothing in
        the layers. Where layers are inserted, ``base_layers`` (the base's, with the inserted ones
        in the path) and ``all_layers``. Else ``main``, the base's attention with the graft in the
        path, and with attention of the graft beside it (see ``Watch``) ``main_and_learners``: its
        weights times their share are added, so that a query gives up to 2.

    Raises:
        UsageError: An attention whose weights cannot be found out.
    """
    flow = model.workflow(workflow)
    graft, anatomy = flow.graft, model.anatomy
    base = _attentions(decoder_layers(model.base, anatomy), anatomy)
    found = {}
    with _inactive(graft):
        sums = _run(model, inputs, flow.name, base)
    found[PROJECTOR_ONLY] = _gather(sums, base)
    if not graft.active or not any(map(graft.acts_on, range(anatomy.num_layers))):
        return found
    everything, kinds = dict(base), {type(attention) for attention in base.values()}
    for index, module in graft.layer_modules():
        attention = _submodule(module, anatomy.attention_name)
        if attention is not None and type(attention) in kinds:  # not adapters under its name
            everything[f"{index}{INSERTED}"] = attention
    beside: dict[str, Tensor] = {}
    sums = _run(model, inputs, flow.name, everything, graft, beside)
    main = _gather(sums, base)
    if beside:
        both = {n: s + beside[n] if n in beside else s for n, s in sums.items()}
        return {**found, "main": main, "main_and_learners": _gather(both, base)}
    if len(everything) == len(base):
        return {**found, "main": main}
    order = sorted(everything, key=lambda name: (int(name.rstrip(INSERTED)), name))
    return {**found, "base_layers": main, "all_layers": _gather(sums, order)}


def _attentions(layers: nn.ModuleList, anatomy: Anatomy) -> dict[str, nn.Module]:
    """Return attentions by layer; layers of another kind (with a running state) have none."""
    found = {str(i): _submodule(layer, anatomy.attention_name) for i, layer in enumerate(layers)}
    return {name: module for name, module in found.items() if module is not None}


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


@contextmanager
def _inactive(graft: Graft) -> Iterator[None]:
    """Leave the graft out of the path, as ``graft_active: false`` of a stage does."""
    before, graft.active = graft.active, False
    try:
        yield
    finally:
        graft.active = before


def _run(
    model: GraftedModel,
    inputs: Mapping[str, Tensor],
    workflow: str,
    attentions: Mapping[str, nn.Module],
    graft: Graft | None = None,
    beside: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run one forward; return sums by name, and put what the graft watches into ``beside``."""
    ids = inputs["input_ids"]
    image, mask = inputs.get("mm_token_type_ids"), inputs.get("attention_mask")
    kinds = kinds_of((ids.shape[0], ids.shape[1]), image, mask, ids.device)
    # A graft beside the attention may read its weights.
    reads = graft is not None and type(graft).layer_context is not Graft.layer_context
    sums = AttentionSums(side_columns(kinds), kinds != PADDING, whole=reads)

    def watch(
        index: int, query: Tensor, key: Tensor, mask: Tensor, seen: Tensor, share: Tensor | None
    ) -> None:
        def call(columns: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(query, key, columns, attn_mask=mask)
            return out.transpose(1, 2)

        given = sums.weigh(call, key).masked_fill(~seen, 0.0)  # (b, s, 3)
        sums.add(f"{_WATCHED}{index}", given if share is None else given * share[..., None])

    with ExitStack() as stack:
        stack.enter_context(sums.of(attentions, model.anatomy.attention_in_registry))
        if graft is not None:
            stack.callback(setattr, graft, "watch", graft.watch)
            graft.watch = watch
        model(**inputs, workflow=workflow, use_cache=False, logits_to_keep=1)
    for name in [name for name in sums.sums if name.startswith(_WATCHED)]:
        assert beside is not None
        beside[name.removeprefix(_WATCHED)] = sums.sums.pop(name)
    return sums.sums


def _gather(sums: Mapping[str, Tensor], names: Sequence[str] | Mapping[str, Any]) -> LayerSums:
    chosen = tuple(names)
    stacked = torch.stack([sums[name].cpu() for name in chosen], dim=1)
    return LayerSums(chosen, stacked.double().numpy())
