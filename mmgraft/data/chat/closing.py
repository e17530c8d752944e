"""How a template ends an answer, learnt by writing answers with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmgraft.data.chat.content import Message
from mmgraft.data.chat.transcript import Transcript
from mmgraft.errors import UsageError

MARKER = "zqAnswerqz"
"""Stands for an answer in what is written to learn from."""


@dataclass(frozen=True)
class Closing:
    """What a template writes after an answer up to its end of turn; empty if it writes none."""

    last: str  # where the answer is the last turn
    inner: str  # where a user turn follows


def closing_of(transcript: Transcript, turn: int) -> Closing:
    """Learn how a template ends the answer of this turn: with and without a user turn after it.

    Taken is what both have in common, up to the last special or added token in it: the end of turn
    without the newline that may follow, and without the end of sequence that some templates write
    once, after everything. gpt-oss ends the last answer with another token than the others: then
    each takes its own.
    """
    answer = {**transcript.messages[turn], "role": "assistant", "content": MARKER}
    usual = not transcript.tools and not answer.get("tool_calls")
    known = transcript.learnt.closings
    if usual and "usual" in known:
        return known["usual"]
    short = {key: answer[key] for key in ("role", "content")} if usual else answer
    try:
        tails = _tails(transcript, [{"role": "user", "content": "a"}, short])
    except UsageError:
        tails = _tails(transcript, [*transcript.messages[:turn], answer])
    closing = _common_closing(*tails, added_tokens(transcript))
    if usual:
        known["usual"] = closing
    return closing


def split_at(
    transcript: Transcript, messages: Sequence[Message], marker: str, where: str
) -> tuple[str, str]:
    """The rendered text before and after a marker in it.

    Raises:
        UsageError: where the template writes the marker not exactly once.
    """
    pieces = transcript.render(messages).split(marker)
    if len(pieces) != 2:
        raise UsageError(
            f"{where}: the chat template writes this answer {len(pieces) - 1} times; give another "
            "template"
        )
    return pieces[0], pieces[1]


def added_tokens(transcript: Transcript) -> re.Pattern[str]:
    """Matches the text of a special or added token, but no white space and no sentinel."""
    if transcript.learnt.added_tokens is None:
        tokenizer = transcript.base
        texts = {token.content for token in tokenizer.added_tokens_decoder.values()}
        texts |= set(tokenizer.all_special_tokens)
        names = sorted((text for text in texts if text.strip()), key=len, reverse=True)
        transcript.learnt.added_tokens = re.compile("|".join(map(re.escape, names)) or "(?!)")
    return transcript.learnt.added_tokens


def common_start(one: str, other: str) -> str:
    """The longest text that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _tails(transcript: Transcript, messages: list[dict[str, Any]]) -> tuple[str, str]:
    _, last = split_at(transcript, messages, MARKER, transcript.where)
    try:
        following = [*messages, {"role": "user", "content": "b"}]
        _, inner = split_at(transcript, following, MARKER, transcript.where)
    except UsageError:
        inner = ""  # no user may follow here
    return last, inner


def _common_closing(last: str, inner: str, tokens: re.Pattern[str]) -> Closing:
    common = len(common_start(last, inner))
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
