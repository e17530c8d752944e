"""Perplexity of texts in rolling windows, and how far a model's predictions are from its base's."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from mmgraft.data.batches.sequences import pad
from mmgraft.data.chat.labels import supervise
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.likelihood.likelihood import (
    batches,
    can_go_on,
    context_length,
    plain_ids,
    positions_at_once,
    prefix_id,
)
from mmgraft.evaluation.metrics.intervals import Measured, Statistic, share
from mmgraft.frozen import Frozen
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.workflow import TEXT_WORKFLOW

#: Positions whose fp32 probabilities are held at once; on a CPU more cost page faults.
_POSITIONS, _ON_CARD = 64, 256


class WindowScore(Frozen):
    """Sums over the tokens that one window predicts.

    Attributes:
        tokens: How many.
        log_likelihood: Of the tokens, in nats.
        base_log_likelihood: The same by the base; None without one.
        kl: KL divergence of the model's predictions from the base's, in nats.
    """

    tokens: int
    log_likelihood: float
    base_log_likelihood: float | None = None
    kl: float | None = None


class TextScore(Frozen):
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


class Window(Frozen):
    """Ids that are read, and the last of what follows them, which is predicted.

    Attributes:
        given: What the model reads.
        wanted: What it is to predict: at each of the last positions the id that comes next.
    """

    given: list[int]
    wanted: list[int]


def rolling_windows(ids: Sequence[int], prefix: int, length: int) -> list[Window]:
    """Cut a text so that every id is predicted once, each with the longest context there can be.

    The first window begins with ``prefix``. The others are predicted whole, but the last, which
    reads back so far that it is as long as the others. As lm-evaluation-harness rolls (its
    ``get_rolling_token_windows`` with a context of one token).

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
    """Return a chat's messages, its answer last."""
    before = [dict(message) for message in item.messages]
    return [*before, {"role": "assistant", "content": item.answers[0]}]


def answer_window(processor: GraftProcessor, item: Item, length: int) -> Window:
    """Return the ids of a chat, of which the last answer is predicted, as in training.

    That is its text and the token that ends the turn. A chat that is longer than ``length`` loses
    its prefix.

    Args:
        processor: Its template writes the chat.
        item: With messages up to the question, and an answer.
        length: Ids that a window reads.

    Raises:
        UsageError: The template refuses the chat, or its answer alone is too long.
    """
    encoded = supervise(processor, conversation(item), item.tools, item.where)
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
    chat: bool = False,
    on_result: Callable[[Sequence[int], Sequence[TextScore]], None] = lambda at, scores: None,
) -> list[TextScore]:
    """Compute the log-likelihood of texts, and in the same pass KL(base || model) of all tokens.

    Args:
        model: A graft, whose text workflow runs, or a base by itself; in eval mode.
        processor: The graft's; for plain texts its tokenizer alone.
        items: Texts, as their ``question``; or chats.
        base: The model to compare with.
        batch_size: Windows a batch; fewer where their logits would be many.
        chat: Items are questions whose answers are predicted.
        on_result: Called with the index and the score of each text when it is whole.

    Raises:
        UsageError: See :func:`answer_window`.
    """
    config = (model.base if isinstance(model, GraftedModel) else model).config
    cut = _windows(processor, items, context_length(config, processor.tokenizer), chat)
    numbered = [(at, number) for at, windows in enumerate(cut) for number in range(len(windows))]
    sizes = [(len(cut[at][number].given), 1, len(cut[at][number].given)) for at, number in numbered]
    found: dict[tuple[int, int], WindowScore] = {}
    whole: dict[int, TextScore] = {}

    def end(at: int) -> None:
        scores = tuple(found[at, number] for number in range(len(cut[at])))
        whole[at] = _text_score(items[at], chat, scores)
        on_result([at], [whole[at]])

    step = positions_at_once(config)
    for batch in batches(sizes, batch_size, step):
        chosen = [numbered[one] for one in batch]
        windows = [cut[at][number] for at, number in chosen]
        found.update(zip(chosen, _score(model, base, processor.pad_id, windows, step), strict=True))
        for at in dict.fromkeys(at for at, _ in chosen):
            if all((at, number) in found for number in range(len(cut[at]))):
                end(at)
    for at in [at for at, windows in enumerate(cut) if not windows]:
        end(at)  # nothing that the tokenizer knows
    return [whole[at] for at in range(len(items))]


def _windows(
    processor: GraftProcessor, items: Sequence[Item], length: int, chat: bool
) -> list[list[Window]]:
    if chat:
        return [[answer_window(processor, item, length)] for item in items]
    first = prefix_id(processor.tokenizer)
    ids = [plain_ids(processor.tokenizer, item.question) for item in items]
    for item, text in zip(items, ids, strict=True):
        processor.check_ids(text, item.where)
    return [rolling_windows(each, first, length) for each in ids]


def _text_score(item: Item, chat: bool, windows: tuple[WindowScore, ...]) -> TextScore:
    text = item.answers[0] if chat else item.question
    return TextScore(item.id, len(re.split(r"\s+", text)), len(text.encode()), windows)


def measure_texts(
    scores: Sequence[TextScore], of_base: bool = False, together: Sequence[str] | None = None
) -> tuple[Measured, list[str | int]]:
    """Measure perplexities, and KL to the base where it was computed.

    ``perplexity`` is a token's, ``word_perplexity`` and ``byte_perplexity`` are those of
    lm-evaluation-harness: the exponential of the negative log-likelihood of all texts by their
    words or bytes. ``kl_to_base`` is the mean of KL(base || model) over all tokens predicted.

    Args:
        scores: Of the texts.
        of_base: Measure the base's own log-likelihoods instead.
        together: What each text is resampled with; by default each by itself.

    Returns:
        The measured, one row a window, and the groups to resample: the texts, or the windows where
        there is one text alone.

    Raises:
        UsageError: No token was predicted, or the base did not score.
    """
    rows: list[list[float]] = []
    groups: list[str | int] = []
    names = [score.id for score in scores] if together is None else list(together)
    for score, name in zip(scores, names, strict=True):
        total = sum(window.tokens for window in score.windows)
        for number, window in enumerate(score.windows):
            likelihood = window.base_log_likelihood if of_base else window.log_likelihood
            if likelihood is None:
                raise UsageError("the base did not score these texts; give it in the same pass")
            part = window.tokens / total
            rows.append(
                [-likelihood, window.tokens, score.words * part, score.bytes * part]
                + ([] if of_base or window.kl is None else [window.kl])
            )
            groups.append(name if len(scores) > 1 else number)
    if not rows:
        raise UsageError("the tokenizer finds no token in these texts; give others")
    statistics: dict[str, Statistic] = {
        name: lambda sums, at=at: np.exp(share(0, at)(sums))
        for at, name in enumerate(("perplexity", "word_perplexity", "byte_perplexity"), start=1)
    }
    if len(rows[0]) > 4:
        statistics["kl_to_base"] = share(4, 1)
    return Measured(np.array(rows), statistics, "perplexity"), groups


# -- one batch ----------------------------------------------------------------------------------


def _score(
    model: GraftedModel | PreTrainedModel,
    base: PreTrainedModel | None,
    fill: int,
    windows: Sequence[Window],
    step: int,
) -> list[WindowScore]:
    """Score a batch, in stretches of ``step`` positions where a window is longer."""
    given = pad([window.given for window in windows], fill, "right")  # no row sees its padding
    begins = [len(window.given) - len(window.wanted) for window in windows]
    sums = torch.zeros(len(windows), 3, dtype=torch.float64)
    every = torch.tensor([one for window in windows for one in window.wanted])
    mine = _stretches(model, given, step)
    theirs = None if base is None else _stretches(base, given, step)
    for start, logits in mine:  # (b, stretch, vocab)
        others = None if theirs is None else next(theirs)[1]
        end = start + logits.shape[1]
        sums, every = sums.to(logits.device), every.to(logits.device)
        wanted = every.split([len(window.wanted) for window in windows])
        for row, (window, begin) in enumerate(zip(windows, begins, strict=True)):
            low, high = max(start, begin), min(end, len(window.given))
            if low >= high:
                continue
            part, ids = slice(low - start, high - start), wanted[row][low - begin : high - begin]
            sums[row] += _compare(
                logits[row, part], None if others is None else others[row, part], ids
            )
    kept = 1 if base is None else 3
    found = zip(windows, sums[:, :kept].tolist(), strict=True)
    return [WindowScore(len(window.wanted), *several) for window, several in found]


def _compare(logits: Tensor, others: Tensor | None, wanted: Tensor) -> Tensor:
    """Return sums of log-likelihood, the base's, and KL(base || model), of ``(n, vocab)``."""
    sums = torch.zeros(3, dtype=torch.float64, device=logits.device)
    step = _POSITIONS if logits.device.type == "cpu" else _ON_CARD
    for start in range(0, len(wanted), step):
        part = slice(start, start + step)
        ids = wanted[part, None]
        found = logits[part].float().log_softmax(-1)
        sums[0] += found.gather(-1, ids).double().sum()
        if others is not None:
            expected = others[part].float().log_softmax(-1)
            sums[1] += expected.gather(-1, ids).double().sum()
            apart = torch.where(expected.isneginf(), 0.0, expected - found)
            sums[2] += (expected.exp() * apart).sum(-1).double().sum()
    return sums


def _stretches(
    model: GraftedModel | PreTrainedModel, given: Tensor, step: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield where each stretch begins, and its logits ``(b, stretch, vocab)``."""
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
