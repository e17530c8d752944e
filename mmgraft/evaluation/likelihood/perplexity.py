"""Perplexity of texts in rolling windows, and how far a model's predictions are from its base's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from mmgraft.data.batches.padding import pad
from mmgraft.data.chat.labels import supervise
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.likelihood.likelihood import (
    LOGITS_AT_ONCE,
    can_go_on,
    context_length,
    plain_ids,
    prefix_id,
)
from mmgraft.evaluation.metrics.intervals import Statistic, ratio
from mmgraft.evaluation.metrics.measured import Measured
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.workflow import TEXT_WORKFLOW

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mmgraft.data.chat.processor import GraftProcessor

_POSITIONS = 64  # whose fp32 probabilities are held at once; more cost page faults


@dataclass(frozen=True)
class WindowScore:
    """What was found on the tokens that one window predicts, all of them summed.

    Attributes:
        tokens: How many.
        log_likelihood: Of the tokens, in nats.
        base_log_likelihood: The same by the base; None where none was asked.
        kl: KL divergence of the model's predictions from the base's, in nats.
    """

    tokens: int
    log_likelihood: float
    base_log_likelihood: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class TextScore:
    """One text, or the answer of one chat.

    Attributes:
        id: The item's.
        words: Pieces between white space.
        bytes: In UTF-8.
        windows: In the order of the text; one of a chat.
    """

    id: str
    words: int
    bytes: int
    windows: tuple[WindowScore, ...]


@dataclass(frozen=True)
class Window:
    """Ids that are read, and the last of what follows them, which is predicted.

    Attributes:
        given: What the model reads.
        wanted: What it is to predict: at each of the last positions the id that comes next.
    """

    given: list[int]
    wanted: list[int]


def rolling_windows(ids: Sequence[int], prefix: int, length: int) -> list[Window]:
    """Cut a text so that every id is predicted once, each with as much before it as it can have.

    The first window begins with ``prefix``. The others are predicted whole, but the last, which
    reads back so far that it is as long as the others. As lm-evaluation-harness rolls (its
    `get_rolling_token_windows` with a context of one token).

    Args:
        ids: The text.
        prefix: Stands before it.
        length: Ids that a window reads.
    """
    if not ids:
        return []
    first = min(length, len(ids))
    windows = [Window([prefix, *ids[: first - 1]], list(ids[:first]))]
    done = first
    while done < len(ids):
        end = min(done + length, len(ids))
        windows.append(Window(list(ids[end - length - 1 : end - 1]), list(ids[done:end])))
        done = end
    return windows


def conversation(item: Item) -> list[dict[str, Any]]:
    """A chat's messages, its answer last."""
    asked = [dict(message) for message in item.messages]
    return [*asked, {"role": "assistant", "content": item.answers[0]}]


def answer_window(processor: GraftProcessor, item: Item, length: int) -> Window:
    """The ids of a chat, of which the last answer is predicted, as training learns it.

    That is its text and the token that ends the turn. A chat that is longer than ``length`` loses
    its beginning.

    Args:
        processor: Its template writes the chat.
        item: With messages up to the question, and an answer.
        length: Ids that a window reads.

    Raises:
        UsageError: The template refuses the chat, or its answer alone is too long.
    """
    encoded = supervise(processor, conversation(item), where=item.where)
    start, end = encoded.spans[-1]
    if end - start > length:
        raise UsageError(
            f"{item.where}: the answer has {end - start} tokens, and the base reads {length}; "
            "shorten it, or leave the row out"
        )
    ids = encoded.input_ids[max(0, end - 1 - length) : end]
    return Window(ids[:-1], ids[start - end :])


@torch.inference_mode()
def score_texts(
    model: GraftedModel | PreTrainedModel,
    processor: GraftProcessor,
    items: Sequence[Item],
    *,
    base: PreTrainedModel | None = None,
    batch_size: int = 16,
    length: int | None = None,
    chat: bool = False,
    on_result: Callable[[TextScore], None] = lambda score: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TextScore]:
    """Log-likelihood of texts, and in the same pass KL(base || model) at every token predicted.

    Of plain texts equal to lm-evaluation-harness's rolling log-likelihood.

    Args:
        model: A graft, whose text workflow is asked, or a base by itself; in eval mode.
        processor: The graft's. Of plain texts only its tokenizer is used, and no template.
        items: Texts, as their `question`; or chats.
        base: What to compare with.
        batch_size: Windows at a time, of like length; fewer where their logits would be many.
        length: Ids that a window reads; default: what the base was made for.
        chat: Items are questions, and of each chat its answer is predicted.
        on_result: Given each text's score when it is whole, to be kept.
        progress: Told how many texts are scored, and of how many.

    Returns:
        Scores in the order of the items.

    Raises:
        UsageError: See :func:`answer_window`.
    """
    stock = model.base if isinstance(model, GraftedModel) else model
    tokenizer, config = processor.tokenizer, stock.config
    length = length or context_length(config, tokenizer)
    if chat:
        cut = [[answer_window(processor, item, length)] for item in items]
    else:
        first = prefix_id(tokenizer)
        ids = [plain_ids(tokenizer, item.question) for item in items]
        cut = [rolling_windows(each, first, length) for each in ids]
    texts = [item.answers[0] if chat else item.question for item in items]
    places = [(at, number) for at, windows in enumerate(cut) for number in range(len(windows))]
    found: dict[tuple[int, int], WindowScore] = {}
    whole: dict[int, TextScore] = {}
    left = [len(windows) for windows in cut]
    step = max(1, LOGITS_AT_ONCE // int(config.get_text_config().vocab_size))
    for chosen in _batches(places, cut, batch_size, step):
        windows = [cut[at][number] for at, number in chosen]
        found.update(zip(chosen, _score(model, base, processor.pad_id, windows, step), strict=True))
        for at, _ in chosen:
            left[at] -= 1
        for at in dict.fromkeys(at for at, _ in chosen):
            if not left[at]:
                scores = tuple(found[at, number] for number in range(len(cut[at])))
                whole[at] = _text_score(items[at].id, texts[at], scores)
                on_result(whole[at])
        progress(len(whole), len(items))
    for at, windows in enumerate(cut):
        if not windows:  # nothing that the tokenizer knows
            whole[at] = _text_score(items[at].id, texts[at], ())
            on_result(whole[at])
    return [whole[at] for at in range(len(items))]


def measure_texts(
    scores: Sequence[TextScore],
    of_base: bool = False,
    together: Sequence[str] | None = None,
) -> tuple[Measured, list[str | int]]:
    """Perplexities, and KL to the base where it was measured.

    `perplexity` is a token's, `word_perplexity` and `byte_perplexity` are those of
    lm-evaluation-harness: the exponential of the negative log-likelihood of all texts by their
    words or bytes. `kl_to_base` is the mean of KL(base || model) over all tokens predicted.

    Args:
        scores: Of the texts.
        of_base: Measure the base's own log-likelihoods instead.
        together: What each text is drawn with; by default each by itself.

    Returns:
        The measured, one row a window, and the groups to draw: the texts, or the windows where
        there is one text alone.

    Raises:
        UsageError: No token was predicted, or the base was not asked.
    """
    rows: list[list[float]] = []
    groups: list[str | int] = []
    names = [score.id for score in scores] if together is None else list(together)
    for score, name in zip(scores, names, strict=True):
        total = sum(window.tokens for window in score.windows)
        for number, window in enumerate(score.windows):
            likelihood = window.base_log_likelihood if of_base else window.log_likelihood
            if likelihood is None:
                raise UsageError(
                    "the base was not asked about these texts; ask it in the same pass"
                )
            share = window.tokens / total
            rows.append(
                [-likelihood, window.tokens, score.words * share, score.bytes * share]
                + ([] if of_base or window.kl is None else [window.kl])
            )
            groups.append(name if len(scores) > 1 else number)
    if not rows:
        raise UsageError("the tokenizer finds no token in these texts; give others")
    statistics: dict[str, Statistic] = {
        name: _exponential(0, at) for at, name in enumerate(_PERPLEXITIES, start=1)
    }
    if len(rows[0]) > len(_PERPLEXITIES) + 1:
        statistics["kl_to_base"] = lambda sums: ratio(sums[..., [4, 1]])
    return Measured(np.array(rows), statistics, "perplexity"), groups


_PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")


def _exponential(above: int, below: int) -> Statistic:
    return lambda sums: np.exp(ratio(sums[..., [above, below]]))


def _text_score(name: str, text: str, windows: tuple[WindowScore, ...]) -> TextScore:
    return TextScore(name, len(re.split(r"\s+", text)), len(text.encode()), windows)


# -- one batch ----------------------------------------------------------------------------------


def _batches(
    places: Sequence[tuple[int, int]], cut: Sequence[Sequence[Window]], batch_size: int, most: int
) -> Iterator[list[tuple[int, int]]]:
    """Windows of like length, the longest first, ``most`` positions at a time where they fit."""
    size = {place: len(cut[place[0]][place[1]].given) for place in places}
    batch: list[tuple[int, int]] = []
    for place in sorted(places, key=lambda place: (-size[place], place)):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * size[batch[0]] > most):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _score(
    model: GraftedModel | PreTrainedModel,
    base: PreTrainedModel | None,
    fill: int,
    windows: Sequence[Window],
    step: int,
) -> list[WindowScore]:
    """A batch, in stretches of ``step`` positions where a window is longer."""
    given = pad([window.given for window in windows], fill, "right")  # no row sees its padding
    begins = [len(window.given) - len(window.wanted) for window in windows]
    sums = torch.zeros(len(windows), 3, dtype=torch.float64)
    mine = _stretches(model, given, step)
    theirs = None if base is None else _stretches(base, given, step)
    for start, logits in mine:  # (b, stretch, vocab)
        others = None if theirs is None else next(theirs)[1]
        end = start + logits.shape[1]
        for row, (window, begin) in enumerate(zip(windows, begins, strict=True)):
            low, high = max(start, begin), min(end, len(window.given))
            if low >= high:
                continue
            wanted = torch.tensor(window.wanted[low - begin : high - begin], device=logits.device)
            part = slice(low - start, high - start)
            sums[row] += _compare(
                logits[row, part], None if others is None else others[row, part], wanted
            )
    found = zip(windows, sums.tolist(), strict=True)
    if base is None:
        return [WindowScore(len(window.wanted), one) for window, (one, _, _) in found]
    return [WindowScore(len(window.wanted), *three) for window, three in found]


def _compare(logits: Tensor, others: Tensor | None, wanted: Tensor) -> Tensor:
    """Sums of log-likelihood, the base's, and KL(base || model), from ``(n, vocab)`` logits."""
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(wanted), _POSITIONS):
        part = slice(start, start + _POSITIONS)
        ids = wanted[part, None]
        found = logits[part].float().log_softmax(-1)
        sums[0] += found.gather(-1, ids).double().sum().cpu()
        if others is not None:
            expected = others[part].float().log_softmax(-1)
            sums[1] += expected.gather(-1, ids).double().sum().cpu()
            apart = torch.where(expected.isneginf(), 0.0, expected - found)
            sums[2] += (expected.exp() * apart).sum(-1).double().sum().cpu()
    return sums


def _stretches(
    model: GraftedModel | PreTrainedModel, given: Tensor, step: int
) -> Iterator[tuple[int, Tensor]]:
    """Where each stretch begins, and its logits ``(b, stretch, vocab)``."""
    stock = model.base if isinstance(model, GraftedModel) else model
    run: Callable[..., Any] = model
    ids = given.to(model.device)
    options: dict[str, Any] = {"use_cache": False}
    if isinstance(model, GraftedModel):
        options["workflow"] = TEXT_WORKFLOW
    if ids.shape[1] <= step or not can_go_on(stock.config):
        yield 0, run(input_ids=ids, **options).logits
        return
    options |= {"use_cache": True, "past_key_values": DynamicCache(config=stock.config)}
    for start in range(0, ids.shape[1], step):
        yield start, run(input_ids=ids[:, start : start + step], **options).logits
