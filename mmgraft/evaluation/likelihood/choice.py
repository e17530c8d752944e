"""Multiple choice by log-probability: which option a model finds likeliest after the question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from string import ascii_uppercase

from transformers import PreTrainedModel

from mmgraft.data.chat.closing import MARKER
from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.chat.transcript import Transcript
from mmgraft.errors import UsageError
from mmgraft.evaluation.generate.run_features import Features
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.likelihood.likelihood import Likelihoods, Request, plain_ids, prefix_id
from mmgraft.evaluation.metrics.choice import ChoiceScore
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.workflow import TEXT_WORKFLOW


def score_choices(
    model: GraftedModel | PreTrainedModel,
    processor: GraftProcessor,
    items: Sequence[Item],
    *,
    workflow: str | None = None,
    chat: bool = True,
    letters: bool = False,
    batch_size: int = 16,
    features: Features | None = None,
    on_result: Callable[[Sequence[int], Sequence[ChoiceScore]], None] = lambda at, scores: None,
) -> list[ChoiceScore]:
    """Compute log-probabilities of every option of every item, in order.

    Args:
        model: A grafted model, or a base by itself.
        processor: The grafted model's.
        items: Items with options.
        workflow: Of all rows; by default items with an image run the model's and others ``text``.
        chat: Apply the processor's template; else question, space and option are one plain text.
        letters: Score "A", "B", ... instead of the options' texts.
        batch_size: Items a batch, of like length.
        features: The tower's features of image files; by default the tower computes them.
        on_result: Called with the indices and the scores of each batch as it ends.

    Raises:
        UsageError: An item that cannot be written so; an unknown workflow.
    """
    options = [ascii_uppercase[: len(one.options)] if letters else one.options for one in items]
    pairs = zip(items, options, strict=True)
    requests = [_request(processor, item, texts, chat) for item, texts in pairs]
    found: dict[int, ChoiceScore] = {}
    for name, chosen in _by_workflow(model, items, workflow):
        likelihoods = Likelihoods(model, processor, name, features)
        for at in chosen:
            _refuse_long(items[at], requests[at], likelihoods.length)
        for batch in likelihoods.batches([requests[at] for at in chosen], batch_size):
            indices = [chosen[one] for one in batch]
            sums = likelihoods.score([requests[at] for at in indices])
            for at, one in zip(indices, sums, strict=True):
                tokens = tuple(map(len, requests[at].continuations))
                characters = tuple(map(len, options[at]))
                found[at] = ChoiceScore(items[at].id, tuple(one), tokens, characters)
            on_result(indices, [found[at] for at in indices])
    return [found[at] for at in range(len(items))]


def _by_workflow(
    model: GraftedModel | PreTrainedModel, items: Sequence[Item], workflow: str | None
) -> Iterator[tuple[str, list[int]]]:
    """Yield the workflow of items with images, and of those without, with their indices."""
    sees = workflow
    if isinstance(model, GraftedModel) and workflow != TEXT_WORKFLOW:
        sees = model.workflow(workflow).name
    for with_images, name in ((True, sees), (False, workflow)):
        chosen = [at for at, item in enumerate(items) if item.has_image is with_images]
        if chosen:
            yield name or TEXT_WORKFLOW, chosen


def _refuse_long(item: Item, request: Request, length: int) -> None:
    longest = request.longest
    if request.context.images and longest > length:
        raise UsageError(
            f"{item.where}: the question has {longest} positions with its images and an option, "
            f"and the base reads {length}; shorten it, or leave it out"
        )


# -- questions as ids ---------------------------------------------------------------------------


def _request(processor: GraftProcessor, item: Item, texts: Sequence[str], chat: bool) -> Request:
    request = (_chat if chat else _plain)(processor, item, texts)
    for text, ids in zip(texts, request.continuations, strict=True):
        processor.check_ids([*request.context.input_ids, *ids], item.where)
        if not ids:
            raise UsageError(
                f"{item.where}: the option {text!r} adds no token to the question; write another"
            )
    return request


def _plain(processor: GraftProcessor, item: Item, texts: Sequence[str]) -> Request:
    """Write question and options as one text each, cut where the question's own ids end.

    Spaces at the question's end belong to the options. Source: lm-evaluation-harness, how it
    encodes a context and a continuation.
    """
    if item.has_image or len(item.messages) != 1:
        raise UsageError(
            f"{item.where}: {'an image' if item.has_image else 'several turns'} cannot be written "
            "as plain text; use the chat template (chat: true in a set of text)"
        )
    tokenizer = processor.tokenizer
    question = str(item.messages[0]["content"])
    stripped = question.rstrip()
    gap = question[len(stripped) :]
    if not stripped:
        wholes = [tokenizer.encode(f"{gap} {text}", add_special_tokens=False) for text in texts]
        return Request(Encoded([prefix_id(tokenizer)], [0], []), wholes)
    context = plain_ids(tokenizer, stripped)
    wholes = [plain_ids(tokenizer, f"{stripped}{gap} {text}") for text in texts]
    encoded = Encoded(context, [0] * len(context), [])
    return Request(encoded, [whole[len(context) :] for whole in wholes])


def _chat(processor: GraftProcessor, item: Item, texts: Sequence[str]) -> Request:
    """Write the conversation up to the answer, and each option as the answer's first ids."""
    messages = [dict(message) for message in item.messages]
    transcript = processor.transcript(messages, item.tools, item.where)
    prompt = transcript.render(add_generation_prompt=True)
    context = transcript.ids(prompt)
    gap = _gap(transcript, prompt)
    wholes = [transcript.ids(f"{prompt}{gap}{text}")[len(context) :] for text in texts]
    return Request(processor.expand(transcript, context), wholes)


def _gap(transcript: Transcript, prompt: str) -> str:
    """Return what the template writes between the answer's header and the answer."""
    answer = {"role": "assistant", "content": MARKER}
    whole = transcript.render([*transcript.messages, answer])
    at = whole.find(MARKER, len(prompt))
    return whole[len(prompt) : at] if at >= 0 and whole.startswith(prompt) else ""
