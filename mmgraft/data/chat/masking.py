"""Which tokens of a conversation are learnt: every answer and the token that ends it.

The chat template decides, not pieces of text. Where it marks what the assistant writes with
`{% generation %}`, its mask is used. Where not, an answer begins where the prompt for it ends: the
ids of the turns before it with the answer's header must be the first ids of the whole conversation,
so that a model is trained on the ids that it will see. Templates that write a turn differently
once more turns follow (Qwen3 drops the reasoning of all but the last) are fine as long as that
holds; where it does not, an error names row and turn.

An answer's end is found by writing the conversation again with a marker in the answer's place: what
follows the marker is the template's, up to the end-of-turn token, which is learnt. The newline that
some templates put after it is not: no model has to write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmgraft.data.chat.closing import MARKER, closing_of, split_at
from mmgraft.data.chat.content import Message, answering
from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.chat.template import marks_answers
from mmgraft.data.chat.transcript import Transcript
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError

Span = tuple[int, int]


def supervise_row(processor: GraftProcessor, row: Row) -> Encoded:
    """A row as ids, with the spans to learn; see `supervise`."""
    return supervise(processor, row.messages, row.tools, row.where)


def supervise(
    processor: GraftProcessor,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    where: str = "the conversation",
) -> Encoded:
    """Tokenise a whole conversation and find what is to be learnt of it.

    A template that ends the last answer with nothing at all gets the tokenizer's end-of-sequence
    token there, so that the model learns to stop. Image positions are never learnt.

    Returns:
        The ids with `spans`, and so `labels`.

    Raises:
        UsageError: for a conversation without an answer, one that the template refuses, and one
            whose answers do not continue their prompts; each names the row, the last also the turn.
    """
    turns = answer_turns(messages, where)
    transcript = processor.transcript(messages, tools, where)
    if transcript.tokenizer.is_fast and marks_answers(transcript.source):
        ids, spans = _marked(transcript)
    else:
        try:
            ids, spans = _by_prefix(transcript, turns)
        except UsageError:
            if "strftime_now" not in transcript.source:
                raise
            # The template writes the time of day or the date; it may have changed in between.
            ids, spans = _by_prefix(transcript, turns)
    encoded = processor.expand(transcript, ids, spans)
    if all(label == -100 for label in encoded.labels):
        raise UsageError(f"{where}: nothing to learn is left after its template; leave the row out")
    return encoded


def answer_turns(messages: Sequence[Message], where: str) -> list[int]:
    """The turns in which the assistant says something.

    Raises:
        UsageError: naming the row, where there is none, so that nothing can be learnt.
    """
    turns = answering(messages)
    if not turns:
        raise UsageError(
            f"{where}: nothing to learn, for no assistant turn says anything; add an answer, or "
            "leave the row out"
        )
    return turns


# The template's own marks


def _marked(transcript: Transcript) -> tuple[list[int], list[Span]]:
    """Spans of `{% generation %}`, each with the end-of-turn token where the mark leaves it out."""
    transcript.render()  # refuses by name what the template does not take
    encoding: Any = transcript.tokenizer.apply_chat_template(
        transcript.messages,
        tools=list(transcript.tools) if transcript.tools else None,
        chat_template=transcript.template.text,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **transcript.options,
    )
    ids: list[int] = list(encoding["input_ids"])
    mask: list[int] = list(encoding["assistant_masks"])
    closing = closing_of(transcript, len(transcript.messages) - 1)
    ends = {transcript.ids(text)[-1] for text in (closing.last, closing.inner) if text}
    spans: list[Span] = []
    at = 0
    while at < len(mask):
        start = at
        while at < len(mask) and mask[at]:
            at += 1
        if at > start:
            closed = ids[at - 1] in ends
            at += at < len(ids) and not closed and not mask[at] and ids[at] in ends
            spans.append((start, at))
        else:
            at += 1
    return ids, spans


# Prefixes


def _by_prefix(transcript: Transcript, turns: Sequence[int]) -> tuple[list[int], list[Span]]:
    whole = transcript.render()
    ids = transcript.ids(whole)
    spans: list[Span] = []
    for turn in turns:
        where = f"{transcript.where}, turn {turn + 1}"
        last = turn == len(transcript.messages) - 1
        extent = _extent(transcript, turn, whole, last, where)
        head = transcript.ids(extent.head)
        start = _shared(head, ids)
        if start != len(head):
            begins = whole[len(extent.head) : len(extent.head) + 8]
            raise UsageError(
                f"{where}: the tokens of this answer do not continue those of its prompt, for its "
                f"first characters, {begins!r}, melt into the last ones before it; take white "
                "space off the answer's start (in plain text also off the end of the turn before)"
            )
        end = max(start, _shared(transcript.ids(whole[: extent.end]), ids))
        if last and not extent.closed and transcript.tokenizer.eos_token_id is not None:
            ids = [*ids[:end], transcript.tokenizer.eos_token_id]
            end += 1
        spans.append((start, end))
    return ids, spans


@dataclass(frozen=True)
class _Extent:
    """Where an answer lies in the whole text: after `head`, up to character `end`."""

    head: str
    end: int
    closed: bool  # by an end of turn


def _extent(transcript: Transcript, turn: int, whole: str, last: bool, where: str) -> _Extent:
    messages = transcript.messages
    marker = _unused_marker(whole)
    marked = {**messages[turn], "content": marker}
    head, tail = split_at(
        transcript, [*messages[:turn], marked, *messages[turn + 1 :]], marker, where
    )
    closing = closing_of(transcript, turn)
    ending = closing.last if last else closing.inner
    # A call of tools without a word may have less before its end than one that says something.
    rest = tail if messages[turn].get("content") else tail[len(ending) :]
    if not tail.startswith(ending) or not whole.endswith(rest):
        raise UsageError(
            f"{where}: what the chat template writes after this answer depends on the answer, so "
            "its end cannot be told; give a template file that marks answers with {% generation %}"
        )
    end = len(whole) - len(tail) + len(ending)
    if turn:
        head = transcript.render(messages[:turn], add_generation_prompt=True)
    if not whole.startswith(head) or len(head) > end:
        raise UsageError(
            f"{where}: the chat template writes the turns before this answer differently once the "
            "answer is there, so a model would be trained on a prompt that it never sees; change "
            "those turns (a system message, for one), or give a template file that marks answers "
            "with {% generation %}"
        )
    return _Extent(head, end, bool(ending))


def _unused_marker(text: str) -> str:
    marker = MARKER
    while marker in text:
        marker += "z"
    return marker


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many first ids two lists have in common."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(ids), len(others)))
