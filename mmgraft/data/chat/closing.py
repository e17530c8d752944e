"""The ends of answers in a text, and how a template closes them; learned by writing answers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from mmgraft.data.chat.content import Message
from mmgraft.data.chat.transcript import Transcript, shared_length
from mmgraft.errors import UsageError

MARKER = "zqAnswerqz"
"""Stands for an answer in what is written to learn from."""


@dataclass(frozen=True)
class Closing:
    """Text of a template between an answer and its end of turn; empty if it writes none."""

    last: str  # where the answer is the last turn
    inner: str  # where a user turn follows


def closing_of(transcript: Transcript, turn: int, where: str) -> Closing:
    """Learn how a template ends the answer of this turn: with and without a user turn after it.

    Taken is what both have in common, up to the last special or added token in it: the end of turn
    without the newline that may follow, and without the end of sequence that some templates write
    once, after everything. gpt-oss ends the last answer with another token than the others: then
    each takes its own.
    """
    answer = {**transcript.messages[turn], "role": "assistant", "content": MARKER}
    usual = not answer.get("tool_calls")
    known, key = transcript.copies.closings, bool(transcript.tools)
    if usual and key in known:
        return known[key]
    short = {name: answer[name] for name in ("role", "content")} if usual else answer
    try:
        tails = _tails(transcript, [{"role": "user", "content": "a"}, short], where)
    except UsageError:
        tails = _tails(transcript, [*transcript.messages[:turn], answer], where)
    closing = _common_closing(*tails, transcript.copies.added_tokens)
    if usual:
        known[key] = closing
    return closing


def split_at_answer(transcript: Transcript, turn: int, where: str) -> tuple[str, str]:
    """Write the conversation with a marker in an answer's place; gives the text on both sides.

    Raises:
        UsageError: The template does not write the answer exactly once.
    """
    messages = list(transcript.messages)
    marker = unused_marker(transcript.tokens.text)
    messages[turn] = {**messages[turn], "content": marker}
    return _split(transcript, messages, marker, where)


def content_ends(transcript: Transcript, turns: Collection[int]) -> dict[int, int]:
    """Find where the contents of turns end in the text, by writing it once more with marks there.

    Content that ends in white space, which a template may trim, is not marked, nor is an image.

    Returns:
        The character behind the content by turn, of the turns whose content stands once in the
        text; none at all where marks change what the template writes.
    """
    text = transcript.tokens.text
    marker = unused_marker(text)
    messages = list(transcript.messages)
    for turn in turns:
        content = messages[turn].get("content") if turn >= 0 else None
        image = transcript.sentinel is not None and str(content).endswith(transcript.sentinel)
        if isinstance(content, str) and content[-1:].strip() and not image:
            messages[turn] = {**messages[turn], "content": f"{content}{marker}{turn};"}
    pieces = re.split(rf"{marker}(\d+);", transcript.render(messages))
    numbers = pieces[1::2]
    if "".join(pieces[::2]) != text:
        return {}
    ends = accumulate(map(len, pieces[::2]))
    return {
        int(number): end
        for number, end in zip(numbers, ends, strict=False)
        if numbers.count(number) == 1
    }


def unused_marker(text: str) -> str:
    """Return a marker that a text does not contain."""
    marker = MARKER
    while marker in text:
        marker += "z"
    return marker


def _split(
    transcript: Transcript, messages: Sequence[Message], marker: str, where: str
) -> tuple[str, str]:
    pieces = transcript.render(messages).split(marker)
    if len(pieces) != 2:
        raise UsageError(
            f"{where}: the chat template writes this answer {len(pieces) - 1} times; give another "
            "template"
        )
    return pieces[0], pieces[1]


def _tails(transcript: Transcript, messages: list[dict[str, Any]], where: str) -> tuple[str, str]:
    _, last = _split(transcript, messages, MARKER, where)
    try:
        following = [*messages, {"role": "user", "content": "b"}]
        _, inner = _split(transcript, following, MARKER, where)
    except UsageError:
        inner = ""  # no user may follow here
    return last, inner


def _common_closing(last: str, inner: str, tokens: re.Pattern[str]) -> Closing:
    common = shared_length(last, inner)
    shared = [match.end() for match in tokens.finditer(last) if match.end() <= common]
    if shared:
        return Closing(last[: shared[-1]], last[: shared[-1]])
    own = tokens.search(last)
    if own is None:
        words = last.rstrip()
        return Closing(words, words) if words and inner.startswith(words) else Closing("", "")
    blank = len(inner) - len(inner.lstrip())
    next_own = tokens.match(inner, blank)
    if next_own is None or last[: own.start()].strip():
        return Closing(last[: own.end()], "")
    return Closing(last[: own.end()], inner[: next_own.end()])
