"""Ask a model a set's questions: greedy answers in batches, kept line by line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmgraft.data.images import open_images
from mmgraft.errors import UsageError
from mmgraft.evaluation.generate.predictions import Predictions
from mmgraft.evaluation.generate.shared_prefix import image_key, read_beginning
from mmgraft.evaluation.items.item import Item
from mmgraft.model.kernels.flat_head import flat_heads
from mmgraft.model.workflow import TEXT_WORKFLOW

if TYPE_CHECKING:
    from mmgraft.data.chat.processor import Encoded, GraftProcessor
    from mmgraft.model.modeling import GraftedModel

Features = Callable[[list[Path]], Tensor]
"""The tower's features of image files, ``(n, P, tower width)``."""

OnAnswers = Callable[[Sequence[int], Sequence[str]], None]
"""Told which conversations of a batch are answered, and how."""


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
    on_answers: OnAnswers = lambda places, texts: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Greedy answers of a model, in batches of rows of like length.

    Rows about one picture come after one another, and what the rows of a batch begin with alike is
    read once; see :func:`mmgraft.evaluation.generate.shared_prefix.read_beginning`.

    Args:
        model: With a workflow that sees, where conversations have images.
        processor: The model's.
        conversations: Messages, each ending with a question.
        batch_size: Conversations at a time.
        max_new_tokens: An answer is cut there.
        features: The tower's features of image files, such as a cache gives; by default images are
            opened and run through the tower.
        workflow: For all rows; by default rows with an image run the model's and others ``text``.
        names: What errors call each conversation.
        on_answers: Told the answers of each batch as it ends.
        progress: Told how many are answered, and of how many.

    Returns:
        Texts without special tokens, in the order of the conversations.

    Raises:
        UsageError: An image that cannot be read, a workflow that the model does not have, or a
            conversation that the template refuses or the base has too few positions for.
    """
    names = names or [f"conversation {at}" for at in range(1, len(conversations) + 1)]
    encoded = [
        processor.encode(messages, where=name)
        for messages, name in zip(conversations, names, strict=True)
    ]
    refuse_longer(encoded, names, model.anatomy.position_table, max_new_tokens)
    if workflow not in (None, TEXT_WORKFLOW):
        model.workflow(workflow)  # says which there are
    batches = [
        (kind, part)
        for kind, places in _by_workflow(model, encoded, workflow).items()
        for part in _batches(encoded, places, batch_size, not _pads(model, kind))
    ]
    texts = [""] * len(encoded)
    done = 0
    for kind, places in batches:
        asked = _Batch(model, processor, [encoded[at] for at in places], features, kind)
        made = asked.answers(max_new_tokens, [names[at] for at in places])
        for at, text in zip(places, made, strict=True):
            texts[at] = text
        done += len(places)
        on_answers(places, made)
        progress(done, len(encoded))
    return texts


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
            fewer = ", ask for fewer tokens (max_new_tokens)" if len(row) <= positions else ""
            raise UsageError(
                f"{name}: {len(row)} positions{tokens}, and the base has a table "
                f"of {positions}; shorten it{fewer}, or leave it out"
            )


def ask(
    model: GraftedModel,
    processor: GraftProcessor,
    items: Sequence[Item],
    predictions: Predictions,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 8,
    features: Features | None = None,
    workflow: str | None = None,
    messages: Callable[[Item], Sequence[Mapping[str, Any]]] = lambda item: item.messages,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Answers to a set's questions, of which those that an earlier run has kept are not asked.

    Args:
        model: See :func:`answer`.
        processor: The model's.
        items: The set.
        predictions: Where answers are kept, a batch at a time.
        batch_size: See :func:`answer`.
        max_new_tokens: See :func:`answer`.
        features: See :func:`answer`.
        workflow: See :func:`answer`.
        messages: What is asked of an item; images can be left out of it.
        progress: Told how many of the set are answered, and of how many.

    Returns:
        Answers in the order of the items.
    """
    left = [item for item in items if item.id not in predictions.done]
    before = len(items) - len(left)

    def keep(places: Sequence[int], texts: Sequence[str]) -> None:
        predictions.add(_line(left[at], text) for at, text in zip(places, texts, strict=True))

    if before:
        progress(before, len(items))
    answer(
        model,
        processor,
        [messages(item) for item in left],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        features=features,
        workflow=workflow,
        names=[item.where for item in left],
        on_answers=keep,
        progress=lambda done, _: progress(before + done, len(items)),
    )
    return [str(predictions.done[item.id]["answer"]) for item in items]


def _line(item: Item, text: str) -> dict[str, Any]:
    truth = list(item.answers) if item.box is None else list(item.box)
    return {"id": item.id, "question": item.question, "truth": truth, "answer": text}


class _Batch:
    """Rows of one workflow, answered together."""

    def __init__(
        self,
        model: GraftedModel,
        processor: GraftProcessor,
        rows: Sequence[Encoded],
        features: Features | None,
        workflow: str,
    ) -> None:
        self.model, self.processor, self.rows = model, processor, rows
        self.features, self.workflow = features, workflow

    def answers(self, max_new_tokens: int, names: Sequence[str]) -> list[str]:
        processor, rows = self.processor, self.rows
        for row, name in zip(rows, names, strict=True):
            if self.features is None:
                open_images(row.images, name)  # an error names the item
        with torch.no_grad(), flat_heads(self.model):
            inputs = self._inputs(max_new_tokens)
            made = self.model.generate(
                **inputs,
                workflow=self.workflow,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=processor.pad_id,
            )
        length = inputs["input_ids"].shape[1]
        return [processor.decode(ids[length:]).strip() for ids in made]

    def _inputs(self, max_new_tokens: int) -> dict[str, Any]:
        """Inputs of ``generate``: the common beginning, padding, and the rest of each row."""
        processor, rows = self.processor, self.rows
        beginning = read_beginning(
            self.model,
            rows,
            self.workflow,
            self._image_inputs,
            max_new_tokens,
        )
        start, seen = (beginning.length, beginning.images) if beginning else (0, 0)
        inputs: dict[str, Any] = processor.pad([row.part(start) for row in rows], "left")
        if beginning is not None:
            first = processor.pad([row.part(0, start) for row in rows], "left")
            inputs = {name: torch.cat([first[name], inputs[name]], dim=1) for name in inputs}
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if beginning is not None:
            inputs["past_key_values"] = beginning.cache
        if any(len(row.images) > seen for row in rows):  # counting those of all columns
            inputs.update(self._image_inputs(rows))
        return inputs

    def _image_inputs(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        images = [image for row in rows for image in row.images]
        if not images:
            return {}
        given = self.processor.images_of(rows)
        device = self.model.device
        if self.features is not None:
            features = self.features([Path(image) for image in images])
            return {**given, "image_features": features.to(device)}
        pixels = self.processor.pixels(open_images(images, "a batch of questions"))
        return {**given, "pixel_values": pixels.to(device)}


def _by_workflow(
    model: GraftedModel, rows: Sequence[Encoded], workflow: str | None
) -> dict[str, list[int]]:
    """Places of rows by the workflow that they run."""
    found: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        own = model.default_workflow if row.images else TEXT_WORKFLOW
        found.setdefault(workflow or own, []).append(at)
    return found


def _pads(model: GraftedModel, workflow: str) -> bool:
    """Whether rows may be padded on the left; the official variant of Wings takes none."""
    return workflow == TEXT_WORKFLOW or model.workflow(workflow).graft.cacheable


def _batches(
    rows: Sequence[Encoded], places: Sequence[int], batch_size: int, even: bool
) -> list[list[int]]:
    """Rows of like length together, those about one picture after one another.

    Args:
        rows: All.
        places: Those to put into batches.
        batch_size: The most rows of a batch.
        even: Of rows of one length only, so that none is padded.
    """
    numbers: dict[Any, int] = {}
    longest: dict[int, int] = {}
    picture: dict[int, int] = {}
    for at in places:
        key = image_key(rows[at].images[0]) if rows[at].images else at
        picture[at] = numbers.setdefault(key, len(numbers))
        longest[picture[at]] = max(longest.get(picture[at], 0), len(rows[at]))
    order = sorted(places, key=lambda at: (longest[picture[at]], picture[at], len(rows[at])))
    made: list[list[int]] = []
    if even:
        order.sort(key=lambda at: len(rows[at]))
    for at in order:
        full = not made or len(made[-1]) == batch_size
        if full or (even and len(rows[made[-1][0]]) != len(rows[at])):
            made.append([])
        made[-1].append(at)
    return made
