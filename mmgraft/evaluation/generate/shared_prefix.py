"""The prefix that rows of a batch share is read once: a system prompt, and each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mmgraft.data.chat.processor import Encoded
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.workflow import TEXT_WORKFLOW

_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
_SHORTEST = 4


@dataclass(frozen=True)
class Prefix:
    """The first positions of a batch's rows, read into a cache.

    Attributes:
        cache: Of all rows.
        length: Positions read, the same in every row.
        images: Images of each row among them: 0 or 1.
    """

    cache: DynamicCache
    length: int
    images: int


@dataclass(frozen=True)
class _Plan:
    text: int  # positions that all rows share
    image: int  # positions of the image that follows in every row, 0 where it is not read here
    owners: list[int]  # which of the different images each row shows


def read_prefix(
    model: GraftedModel,
    rows: Sequence[Encoded],
    workflow: str,
    image_inputs: Callable[[Sequence[Encoded]], dict[str, Tensor]],
    max_new_tokens: int = 0,
) -> Prefix | None:
    """Read the prefix that rows share, where a cache is exact, and each first image once.

    Args:
        model: In eval mode.
        rows: A batch.
        workflow: Of all rows.
        image_inputs: The images of some rows to inputs of the forward.
        max_new_tokens: Positions that an answer may add.
    """
    plan = _plan(rows)
    if plan is None or not _exact(model, workflow, max(map(len, rows)) + max_new_tokens):
        return None
    cache, device = DynamicCache(config=model.base.config), model.device

    def read(ids: list[list[int]], kind: int, past: int, **images: Tensor) -> None:
        new = torch.tensor(ids, device=device)
        mask = torch.ones(len(ids), past + new.shape[1], dtype=torch.long, device=device)
        model(
            input_ids=new,
            attention_mask=mask,
            mm_token_type_ids=torch.full_like(new, kind),
            past_key_values=cache,
            workflow=workflow,
            use_cache=True,
            logits_to_keep=1,
            **images,
        )

    if plan.text:
        read([rows[0].input_ids[: plan.text]], 0, 0)
    if not plan.image:
        cache.batch_select_indices(torch.zeros(len(rows), dtype=torch.long, device=device))
        return Prefix(cache, plan.text, 0)
    firsts = [plan.owners.index(number) for number in range(max(plan.owners) + 1)]
    if plan.text:
        cache.batch_select_indices(torch.zeros(len(firsts), dtype=torch.long, device=device))
    end = plan.text + plan.image
    ids = [rows[at].input_ids[plan.text : end] for at in firsts]
    read(ids, 1, plan.text, **image_inputs([rows[at].part(plan.text, end) for at in firsts]))
    cache.batch_select_indices(torch.tensor(plan.owners, device=device))
    return Prefix(cache, end, 1)


def image_key(image: Any) -> Any:
    """Return what tells images apart without opening them: path, data URI, or the object."""
    return image if isinstance(image, str) else id(image)


def _plan(rows: Sequence[Encoded]) -> _Plan | None:
    if len(rows) < 2:
        return None
    shortest = min(map(len, rows))
    first = rows[0]
    text = 0
    while text < shortest - 1 and all(
        row.kinds[text] == 0 and row.input_ids[text] == first.input_ids[text] for row in rows
    ):
        text += 1
    image = first.lengths[0] if first.lengths else 0
    alike = all(row.lengths[:1] == (image,) and row.kinds.index(1) == text for row in rows)
    if shortest > text + image and alike:
        numbers: dict[Any, int] = {}
        owners = [numbers.setdefault(image_key(row.images[0]), len(numbers)) for row in rows]
        if len(numbers) < len(rows):
            return _Plan(text, image, owners)
    return _Plan(text, 0, []) if text >= _SHORTEST else None


def _exact(model: GraftedModel, workflow: str, length: int) -> bool:
    if workflow != TEXT_WORKFLOW and model.workflow(workflow).graft.promises.cache:
        return False
    # A window counts columns, those of padding between prefix and rest too.
    window = model.anatomy.sliding_window
    plain = _PLAIN_LAYERS.issuperset(model.anatomy.layer_types)
    return plain and (window is None or length < window)
