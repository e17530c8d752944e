"""Proof of what a graft claims of text beside an image and before it (levels E1 and E2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.model.modeling import GraftedModel

_BESIDE = 3  # rows of text in the batch that is compared


@dataclass(frozen=True)
class LevelReport:
    """Text of a batch with an image, against the base's on the same padded batch.

    Attributes:
        identical: Every logit bit for bit; of E2 every key and value of every layer too.
        max_difference: The largest difference between two of these numbers.
        positions: How many positions were compared.
    """

    identical: bool
    max_difference: float
    positions: int


def prove_levels(
    model: GraftedModel, processor: GraftProcessor, base: PreTrainedModel, prompts: Sequence[str]
) -> dict[str, LevelReport]:
    """Compare a batch of texts and of one row that shows an image between two texts.

    The base reads the same batch with the placeholder where the image stands: no text that is
    compared sees those positions.

    Args:
        model: The grafted model, in eval mode.
        processor: Its processor, with the tower's preprocessing.
        base: The untouched base, in the same dtype and attention.
        prompts: Texts; the first is what stands before the image.

    Returns:
        The levels that the graft claims.
    """
    inputs = _batch(processor, prompts)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    mask = inputs["attention_mask"]
    plain = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    if model._takes_positions:  # the base by itself would count the padding
        plain["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    promises = model.workflow().graft.promises
    with torch.no_grad():
        ours, theirs = (
            one(**given, use_cache=not promises.before)
            for one, given in ((model, inputs), (base, plain))
        )
    kinds, last = inputs["mm_token_type_ids"], len(mask) - 1
    before = (mask[last] == 1) & (kinds[last].cumsum(0) == 0)
    found = {}
    if not promises.beside:
        text = mask[:last].bool()
        found["E1"] = _compared([(ours.logits[:last][text], theirs.logits[:last][text])])
    if not promises.before:
        logits = ours.logits[last, before], theirs.logits[last, before]
        slots = [getattr(out.past_key_values, "layers", []) for out in (ours, theirs)]
        kept = [
            (one[last, :, before[-one.shape[2] :]], other[last, :, before[-one.shape[2] :]])
            for mine, base_slot in zip(*slots, strict=False)  # the graft's own slots come last
            if isinstance(getattr(base_slot, "keys", None), torch.Tensor)  # else a running state
            for one, other in ((mine.keys, base_slot.keys), (mine.values, base_slot.values))
        ]  # a sliding window keeps the last positions alone
        found["E2"] = _compared([logits, *kept])
    return found


def _batch(processor: GraftProcessor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return a few texts, and behind them a row with an image between two texts."""
    texts = [{"type": "text", "text": text} for text in (prompts[0], prompts[1 % len(prompts)])]
    shown = {"type": "image", "image": Image.linear_gradient("L").convert("RGB")}
    rows: list[Any] = [*prompts[:_BESIDE], [texts[0], shown, texts[1]]]
    return processor([[{"role": "user", "content": row}] for row in rows])


def _compared(pairs: Sequence[tuple[Tensor, Tensor]]) -> LevelReport:
    """Compare tensors, of which the first pair's first axis is positions."""
    same = all(torch.equal(one, other.to(one.device)) for one, other in pairs)
    apart = [one.float() - other.to(one.device).float() for one, other in pairs if one.numel()]
    largest = max((each.abs().max().item() for each in apart), default=0.0)
    return LevelReport(same, largest, len(pairs[0][0]))
