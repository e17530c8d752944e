"""Greedy answers of a model to questions, in batches of rows of like length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.images import open_images
from mmgraft.errors import UsageError
from mmgraft.evaluation.generate.run_features import Features, image_inputs
from mmgraft.evaluation.generate.shared_prefix import image_key, read_prefix
from mmgraft.model.kernels.flat_head import flat_heads
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.workflow import TEXT_WORKFLOW


def answer(
    model: GraftedModel,
    processor: GraftProcessor,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 8,
    features: Features | None = None,
    workflow: str | None = None,
    names: Sequence[str] | None = None,
    tools: Sequence[Any] | None = None,
    on_result: Callable[[Sequence[int], Sequence[str]], None] = lambda indices, texts: None,
) -> list[str]:
    """Generate greedy answers without reasoning, in batches of rows of like length.

    Rows about one image follow one another, and the prefix that the rows of a batch share is read
    once; see :func:`mmgraft.evaluation.generate.shared_prefix.read_prefix`.

    Args:
        model: With a workflow that sees, where conversations have images.
        processor: The model's.
        conversations: Messages, each ending with a question.
        batch_size: Conversations a batch.
        max_new_tokens: An answer is cut there.
        features: The tower's features of image files; by default the tower computes them.
        workflow: For all rows; by default rows with an image run the model's and others ``text``.
        names: What errors call each conversation.
        tools: Of each conversation, for the chat template.
        on_result: Called with the indices and the answers of each batch as it ends.

    Raises:
        UsageError: An unreadable image, an unknown workflow, or a row that is refused or too long.
    """
    names = names or [f"conversation {at}" for at in range(1, len(conversations) + 1)]
    rows = zip(conversations, tools or [None] * len(names), names, strict=True)
    encoded = [processor.encode(messages, True, own, name) for messages, own, name in rows]
    refuse_longer(encoded, names, model.anatomy.position_table, max_new_tokens)
    if workflow not in (None, TEXT_WORKFLOW):
        model.workflow(workflow)  # says which there are
    texts: dict[int, str] = {}
    for kind, chosen in _by_workflow(model, encoded, workflow).items():
        for indices in _batches(encoded, chosen, batch_size, not _pads(model, kind)):
            batch = _Batch(model, processor, [encoded[at] for at in indices], features, kind)
            made = batch.answers(max_new_tokens, [names[at] for at in indices])
            texts.update(zip(indices, made, strict=True))
            on_result(indices, made)
    return [texts[at] for at in range(len(encoded))]


def refuse_longer(
    rows: Sequence[Encoded], names: Sequence[str], positions: int | None, new: int = 1
) -> None:
    """Refuse a row that a base's table of positions does not reach for, before any is read.

    Args:
        rows: Read by the base.
        names: What errors call each row.
        positions: Of the table; None where the base has none.
        new: Tokens to come; the last one needs no position.

    Raises:
        UsageError: For the first such row.
    """
    for row, name in zip(rows, names, strict=True):
        if positions is not None and len(row) + new - 1 > positions:
            tokens = f" and up to {new} tokens of an answer" if new > 1 else ""
            fewer = ", generate fewer tokens (max_new_tokens)" if len(row) <= positions else ""
            raise UsageError(
                f"{name}: {len(row)} positions{tokens}, and the base has a table "
                f"of {positions}; shorten it{fewer}, or leave it out"
            )


@dataclass
class _Batch:
    """Rows of one workflow, answered together."""

    model: GraftedModel
    processor: GraftProcessor
    rows: Sequence[Encoded]
    features: Features | None
    workflow: str

    def answers(self, max_new_tokens: int, names: Sequence[str]) -> list[str]:
        processor, rows = self.processor, self.rows
        for row, name in zip(rows, names, strict=True):
            if self.features is None:
                open_images(row.images, name)  # an error names the item
        with torch.no_grad(), flat_heads(self.model), self.model.greedy():
            inputs = self._inputs(max_new_tokens)
            made = self.model.generate(
                **inputs,
                workflow=self.workflow,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=processor.pad_id,
            )
        length = inputs["input_ids"].shape[1]
        return [processor.answer(ids[length:]) for ids in made]

    def _inputs(self, max_new_tokens: int) -> dict[str, Any]:
        """Return inputs of ``generate``: the shared prefix, padding, and the rest of each row."""
        processor, rows = self.processor, self.rows
        to_inputs = self._image_inputs
        prefix = read_prefix(self.model, rows, self.workflow, to_inputs, max_new_tokens)
        start, seen = (prefix.length, prefix.images) if prefix else (0, 0)
        inputs: dict[str, Any] = processor.pad([row.part(start) for row in rows], "left")
        if prefix is not None:
            first = processor.pad([row.part(0, start) for row in rows], "left")
            inputs = {name: torch.cat([first[name], inputs[name]], dim=1) for name in inputs}
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if prefix is not None:
            inputs["past_key_values"] = prefix.cache
        if any(len(row.images) > seen for row in rows):  # counting those of all columns
            inputs.update(self._image_inputs(rows))
        return inputs

    def _image_inputs(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        names = ["a batch of questions"] * len(rows)
        return image_inputs(self.model.device, self.processor, rows, self.features, names)


def _by_workflow(
    model: GraftedModel, rows: Sequence[Encoded], workflow: str | None
) -> dict[str, list[int]]:
    """Return indices of rows by the workflow that they run."""
    found: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        own = model.default_workflow if row.images else TEXT_WORKFLOW
        found.setdefault(workflow or own, []).append(at)
    return found


def _pads(model: GraftedModel, workflow: str) -> bool:
    """Return whether rows may be padded on the left."""
    return workflow == TEXT_WORKFLOW or not model.workflow(workflow).graft.promises.padding


def _batches(
    rows: Sequence[Encoded], indices: Sequence[int], batch_size: int, even: bool
) -> list[list[int]]:
    """Batch rows of like length, those about one image after one another.

    Args:
        rows: All.
        indices: Those to put into batches.
        batch_size: The most rows of a batch.
        even: Of rows of one length only, so that none is padded.
    """
    numbers: dict[Any, int] = {}
    longest: dict[int, int] = {}
    image: dict[int, int] = {}
    for at in indices:
        key = image_key(rows[at].images[0]) if rows[at].images else at
        image[at] = numbers.setdefault(key, len(numbers))
        longest[image[at]] = max(longest.get(image[at], 0), len(rows[at]))
    order = sorted(indices, key=lambda at: (longest[image[at]], image[at], len(rows[at])))
    made: list[list[int]] = []
    if even:
        order.sort(key=lambda at: len(rows[at]))
    for at in order:
        full = not made or len(made[-1]) == batch_size
        if full or (even and len(rows[made[-1][0]]) != len(rows[at])):
            made.append([])
        made[-1].append(at)
    return made
