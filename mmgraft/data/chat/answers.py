"""How a template's answers look: what ends one, and where the reasoning before it ends.

All of it is learned from what the template writes around an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmgraft.data.chat.closing import MARKER, closing_of
from mmgraft.data.chat.transcript import Transcript
from mmgraft.data.chat.turns import THOUGHTS
from mmgraft.errors import UsageError

_THOUGHT = "zqThoughtqz"
_OPENS = re.compile(
    r"(?P<left>[<\[◁]\|?)(?:\w*?[_:])?(?P<stem>think(?:ing)?|thoughts?|reason(?:ing)?|reflection"
    r"|analysis|scratchpad)(?P<right>\|?[>\]▷])",
    re.IGNORECASE,
)
"""The forms in use: <think>, <seed:think>, [THINK], <|begin_of_thought|>, <|START_THINKING|>."""


@dataclass(frozen=True)
class Answers:
    """How answers of a template look.

    Attributes:
        ends: Ids that end an answer.
        stops: Texts that do, where a template ends turns with ordinary text.
        lead: What it writes between the prompt and an answer.
        tags: Beginning and end of reasoning, as it writes them.
        opened: Where the prompt itself begins the reasoning: matches its end.
        special: Matches special tokens where a tag has one: plain text would lose the tag.
    """

    ends: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    lead: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    opened: re.Pattern[str] | None = None
    special: re.Pattern[str] | None = field(default=None, compare=False)
    tokenizer: Any = field(
        default=None, compare=False, repr=False
    )  # transformers looks for ``stops`` with it

    def shown(self, text: str) -> str:
        """Return what comes after the reasoning in a generated text.

        Reasoning that does not end has no answer after it.
        """
        text, closes = text.lstrip(), self.opened
        for stop in self.stops:
            text = text.partition(stop)[0]
        while closes is not None or (opens := self._opening(text)) is not None:
            if closes is None:
                text, closes = text[opens[0] :], opens[1]
            found = closes.search(text)
            if found is None:
                return ""
            text, closes = text[found.end() :].lstrip(), None
        for _, close in self.tags:  # without a beginning, as after a prompt that has it
            text = text.rpartition(close)[2]
        return text.removeprefix(self.lead.strip()) if self.lead.strip() else text

    def _opening(self, text: str) -> tuple[int, re.Pattern[str]] | None:
        """Return where reasoning begins in a text that begins with it, and what ends it."""
        text = text.lstrip()
        for begins, ends in self.tags:
            if text.startswith(begins):
                return len(begins), re.compile(re.escape(ends))
        found = _OPENS.match(text)
        return found and (found.end(), _end_of(found))

    def with_ends(self, own: int | Sequence[int] | None) -> int | list[int] | None:
        """Return ids that end a generation: a base's own, and those that end an answer."""
        known = [own] if isinstance(own, int) else list(own or ())
        more = [one for one in self.ends if one not in known]
        return [*known, *more] if more else own  # type: ignore[return-value]


def _end_of(opening: re.Match[str]) -> re.Pattern[str]:
    left, stem, right = (re.escape(opening[name]) for name in ("left", "stem", "right"))
    return re.compile(rf"{left}(?:/|end)(?:\w*?[_:])?{stem}{right}", re.IGNORECASE)


def learn(transcript: Callable[[list[dict[str, str]]], Transcript]) -> Answers:
    """Learn how a template's answers look, by writing some.

    Args:
        transcript: Makes that of a conversation.
    """
    question = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": MARKER}
    try:
        plain = transcript([question, answer])
        text, prompt = plain.tokens.text, plain.render([question], add_generation_prompt=True)
    except UsageError:
        return Answers()  # it wants other turns than these
    lead = _between(text, prompt, MARKER)
    tags = {pair for key in THOUGHTS if (pair := _tags(plain, question, answer, prompt, key))}
    if len(pieces := lead.split()) == 2 and _OPENS.fullmatch(pieces[0]):
        tags.add((pieces[0], pieces[1]))
    last = list(_OPENS.finditer(prompt))[-1:]
    opened = _end_of(last[0]) if last and not prompt[last[0].end() :].strip() else None
    written = "".join([lead, *(part for pair in tags for part in pair)])
    added = [one.content for one in plain.tokenizer.added_tokens_decoder.values() if one.special]
    special = {one for one in (*added, *plain.tokenizer.all_special_tokens) if one.strip()}
    hides = any(one in written or _OPENS.fullmatch(one) for one in special)
    names = sorted(map(re.escape, special), key=len, reverse=True)
    ends, stops = _ends(plain, written)
    return Answers(
        ends, stops, lead, tuple(sorted(tags, key=len)), opened,
        re.compile("|".join(names)) if hides else None, plain.tokenizer,
    )  # fmt: skip


def _between(text: str, start: str, end: str) -> str:
    at = text.find(end, len(start))
    return text[len(start) : at] if at >= 0 and text.startswith(start) else ""


def _tags(
    plain: Transcript, question: dict[str, str], answer: dict[str, str], prompt: str, key: str
) -> tuple[str, str] | None:
    """Return what the template writes before and after reasoning that it finds under a key."""
    try:
        text = plain.render([question, {**answer, key: _THOUGHT}])
    except UsageError:
        return None
    begins = _between(text, prompt, _THOUGHT).strip()
    ends = _between(text, text.partition(_THOUGHT)[0] + _THOUGHT, MARKER).strip()
    return (begins, ends) if begins and ends else None


def _ends(plain: Transcript, written: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return ids and texts that end an answer, of which none stands before one as well."""
    closing, ids, stops = closing_of(plain, 1, plain.where), [], []
    for text in dict.fromkeys((closing.last, closing.inner)):
        tokens = [one for one in plain.copies.added_tokens.finditer(text)]
        if tokens and tokens[-1].end() == len(text):
            if tokens[-1].group() not in written:
                ids.append(plain.tokenizer.convert_tokens_to_ids(tokens[-1].group()))
        elif text:
            stops.append(text)
    if not closing.last and isinstance(plain.tokenizer.eos_token_id, int):
        ids.append(plain.tokenizer.eos_token_id)  # what is learned instead; see `supervise`
    return tuple(dict.fromkeys(ids)), tuple(stops)
