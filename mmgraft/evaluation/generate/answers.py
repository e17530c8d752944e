"""Greedy answers of a model to questions, in batches of rows of like length.

The prefix that rows of a batch share is read once: a system prompt, and each image.
Heads read positions as one matrix, which torch multiplies without copying the vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mmgraft.anatomy import get_path
from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.images import open_images
from mmgraft.errors import UsageError
from mmgraft.evaluation.generate.run_features import Features, image_inputs
from mmgraft.evaluation.likelihood.likelihood import PLAIN_LAYERS
from mmgraft.frozen import Frozen
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.patching import patched_forward

_SHORTEST = 4


class Prefix(Frozen):
    """The first positions of a batch's rows, read into a cache.

    Attributes:
        cache: Of all rows.
        length: Positions read, the same in every row.
        images: Images of each row among them: 0 or 1.
    """

    cache: DynamicCache
    length: int
    images: int


class _Plan(Frozen):
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
    plain = PLAIN_LAYERS.issuperset(model.anatomy.layer_types)
    return plain and (window is None or length < window)


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
    once; see :func:`mmgraft.evaluation.generate.answers.read_prefix`.

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
        padded = kind == TEXT_WORKFLOW or not model.workflow(kind).graft.promises.padding
        for indices in _batches(encoded, chosen, batch_size, even=not padded):
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


@contextmanager
def flat_heads(model: GraftedModel) -> Iterator[None]:
    """Give every head ``(b * s, h)`` for ``(b, s, h)`` while the block lasts.

    ``generate`` hands a head the last position of each row, which is a view with gaps. torch then
    repeats the head's weight for every row of the batch before it multiplies: with a vocabulary of
    49,152 that is most of the time of a batch. The same products are made either way; sums may
    round differently, so this is not for proofs of identity.
    """
    heads = [get_path(model.base, model.anatomy.head_path)]
    heads += [one.graft.head for one in model._workflow_list() if one.graft.head is not None]
    with ExitStack() as stack:
        for head in heads:
            stack.enter_context(patched_forward(head, _flat_head))
        yield


def _flat_head(original: Any, hidden: Tensor) -> Tensor:
    if hidden.dim() != 3:
        return original(hidden)
    return original(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
