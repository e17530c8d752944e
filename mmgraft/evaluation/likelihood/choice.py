"""Multiple choice by log-probability: which option a model finds likeliest after the question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mmgraft.data.chat.closing import MARKER
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.item import Item

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mmgraft.data.chat.processor import Encoded, GraftProcessor
    from mmgraft.data.chat.transcript import Transcript
    from mmgraft.evaluation.likelihood.likelihood import Features, Request
    from mmgraft.model.modeling import GraftedModel

By = Literal["sum", "token", "character"]


@dataclass(frozen=True)
class ChoiceScore:
    """What a model makes of one item's options.

    Attributes:
        id: The item's.
        sums: Log-probability of each option's text after the question, in nats.
        tokens: Tokens of each.
        characters: Characters of each option.
    """

    id: str
    sums: tuple[float, ...]
    tokens: tuple[int, ...]
    characters: tuple[int, ...]

    def scores(self, by: By = "sum") -> list[float]:
        """Log-probabilities as they are, a token, or a character.

        lm-evaluation-harness's `acc` goes by the first, its `acc_norm` by the last.
        """
        if by == "sum":
            return list(self.sums)
        sizes = self.tokens if by == "token" else self.characters
        return [one / max(size, 1) for one, size in zip(self.sums, sizes, strict=True)]

    def prediction(self, by: By = "sum") -> int:
        """The likeliest option; the first of equals."""
        scores = self.scores(by)
        return scores.index(max(scores))


def shows_options(prompt: str | None) -> bool:
    """Whether a set's prompt shows the options with letters: then the letters are scored."""
    return prompt is not None and "{options}" in prompt


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
    share: bool = True,
    on_result: Callable[[Sequence[ChoiceScore]], None] = lambda scores: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ChoiceScore]:
    """Log-probabilities of every option of every item.

    Args:
        model: A grafted model, or a base by itself.
        processor: The grafted model's.
        items: With options.
        workflow: Of all rows; by default items with an image run the model's and others ``text``.
        chat: Ask through the processor's template, the option as the answer's beginning. Otherwise
            the one turn's text and, after a space, the option are one plain text, as in
            lm-evaluation-harness.
        letters: Score "A", "B", ... instead of the options' texts.
        batch_size: Items at a time, of like length.
        features: The tower's features of image files; by default images are opened and run through
            the tower.
        share: Read each question once for all its options, where that is exact to float rounding.
        on_result: Given the scores of each batch as it ends, to be kept.
        progress: Told how many items are scored, and of how many.

    Returns:
        Scores in the order of the items.

    Raises:
        UsageError: An item without options, or that cannot be asked so; a graft without the
            workflow.
    """
    from mmgraft.evaluation.likelihood.likelihood import Likelihoods
    from mmgraft.model.modeling import GraftedModel
    from mmgraft.model.workflow import TEXT_WORKFLOW

    requests = [_request(processor, item, chat, letters) for item in items]
    found: dict[int, ChoiceScore] = {}
    sees = workflow
    if isinstance(model, GraftedModel) and workflow != TEXT_WORKFLOW:
        sees = model.workflow(workflow).name
    for with_images in (True, False):
        chosen = [at for at, item in enumerate(items) if item.has_image is with_images]
        if not chosen:
            continue
        name = (sees if with_images else workflow) or TEXT_WORKFLOW
        likelihoods = Likelihoods(model, processor, name, features, share)
        asked = [requests[at] for at in chosen]
        _refuse_long(asked, [items[at] for at in chosen], likelihoods.length)
        for places in likelihoods.batches(asked, batch_size):
            sums = likelihoods.score([asked[place] for place in places])
            scores = [
                _score(items[chosen[place]], asked[place], one, letters)
                for place, one in zip(places, sums, strict=True)
            ]
            found.update(zip((chosen[place] for place in places), scores, strict=True))
            on_result(scores)
            progress(len(found), len(items))
    return [found[at] for at in range(len(items))]


def _score(item: Item, request: Request, sums: Sequence[float], letters: bool) -> ChoiceScore:
    return ChoiceScore(
        item.id,
        tuple(sums),
        tuple(len(each) for each in request.continuations),
        tuple(len(text) for text in _texts(item, letters)),
    )


def _texts(item: Item, letters: bool) -> list[str]:
    if not letters:
        return list(item.options)
    return [chr(ord("A") + at) for at in range(len(item.options))]


def _refuse_long(requests: Sequence[Request], items: Sequence[Item], length: int) -> None:
    for request, item in zip(requests, items, strict=True):
        if request.images and request.longest > length:
            raise UsageError(
                f"{item.where}: the question has {request.longest} positions with its images and "
                f"an option, and the base reads {length}; shorten it, or leave it out"
            )


# -- questions as ids ---------------------------------------------------------------------------


def _request(processor: GraftProcessor, item: Item, chat: bool, letters: bool) -> Request:
    from mmgraft.evaluation.likelihood.likelihood import Request

    if not item.options:
        raise UsageError(f"{item.where}: no options to score; give at least two")
    texts = _texts(item, letters)
    if chat:
        encoded, continuations = _chat(processor, item, texts)
        request = Request(
            encoded.input_ids, continuations, encoded.kinds, encoded.images, encoded.sizes
        )
    else:
        context, continuations = _plain(processor, item, texts)
        request = Request(context, continuations)
    for text, ids in zip(texts, request.continuations, strict=True):
        if not ids:
            raise UsageError(
                f"{item.where}: the option {text!r} adds no token to the question; write another"
            )
    return request


def _plain(
    processor: GraftProcessor, item: Item, texts: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Question and options as one text each, cut where the question's own ids end.

    Spaces at the question's end belong to the options. Source: lm-evaluation-harness, how it
    encodes a context and a continuation.
    """
    from mmgraft.evaluation.likelihood.likelihood import plain_ids, prefix_id

    if item.has_image or len(item.messages) != 1:
        raise UsageError(
            f"{item.where}: {'an image' if item.has_image else 'several turns'} cannot be asked as "
            "plain text; ask through the chat template (chat: true in a set of text)"
        )
    tokenizer = processor.tokenizer
    question = str(item.messages[0]["content"])
    stripped = question.rstrip()
    gap = question[len(stripped) :]
    if not stripped:
        first = prefix_id(tokenizer)
        return [first], [
            list(tokenizer.encode(f"{gap} {text}", add_special_tokens=False)) for text in texts
        ]
    context = plain_ids(tokenizer, stripped)
    wholes = [plain_ids(tokenizer, f"{stripped}{gap} {text}") for text in texts]
    return context, [whole[len(context) :] for whole in wholes]


def _chat(
    processor: GraftProcessor, item: Item, texts: Sequence[str]
) -> tuple[Encoded, list[list[int]]]:
    """The conversation up to the answer, and each option as the answer's first ids."""
    messages = [dict(message) for message in item.messages]
    transcript = processor.transcript(messages, where=item.where)
    prompt = transcript.render(add_generation_prompt=True)
    context = transcript.ids(prompt)
    gap = _gap(transcript, prompt)
    wholes = [transcript.ids(f"{prompt}{gap}{text}") for text in texts]
    return processor.expand(transcript, context), [whole[len(context) :] for whole in wholes]


def _gap(transcript: Transcript, prompt: str) -> str:
    """What the template writes between the answer's header and the answer."""
    answer = {"role": "assistant", "content": MARKER}
    whole = transcript.render([*transcript.messages, answer])
    at = whole.find(MARKER, len(prompt))
    return whole[len(prompt) : at] if at >= 0 and whole.startswith(prompt) else ""
