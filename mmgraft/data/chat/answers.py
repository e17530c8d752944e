"""Answers as a template writes them: the end of one, and the reasoning before it.

All of it is read from what the template writes around an answer.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

from mmgraft.data.chat.transcript import MARKER, Closing, Transcript, closing_of
from mmgraft.data.chat.turns import THOUGHTS
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen

_THOUGHT = "zqThoughtqz"
_STEMS = r"(?:\w*?[_:])?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratchpad)"
#: Forms in use: <think>, <seed:think>, [THINK], <|begin_of_thought|>, <|START_THINKING|>.
_BEGINS, _ENDS = rf"[<\[◁]\|?{_STEMS}\|?[>\]▷]", rf"[<\[◁]\|?(?:/|end){_STEMS}\|?[>\]▷]"


#: Version of what :meth:`Answers.shown` leaves of a text: answers kept by another are made anew.
CLEANED = 3


class Answers(Frozen):
    """Describe how a template writes answers.

    Attributes:
        ends: Ids that end an answer.
        stops: Texts that do, where a template ends turns with ordinary text.
        lead: What it writes between the prompt, or the reasoning, and an answer.
        tail: What it writes between an answer and the token that ends it.
        tags: Beginning and end of reasoning, as it writes them.
        opened: The prompt itself begins the reasoning.
        special: Matches special tokens where a tag has one: plain text would lose the tag.
        tokenizer: The base's; transformers looks for ``stops`` with it.
    """

    ends: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    lead: str = ""
    tail: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    opened: bool = False
    special: re.Pattern[str] | None = field(default=None, compare=False)
    tokenizer: Any = field(default=None, compare=False, repr=False)

    def shown(self, text: str) -> str:
        """Return what comes after the reasoning in a generated text.

        Reasoning that does not end has no answer after it.
        """
        text = text.lstrip()
        for stop in self.stops:
            text = text.partition(stop)[0]
        begins, ends = (
            "|".join([known, *(re.escape(pair[at]) for pair in self.tags)])
            for at, known in enumerate((_BEGINS, _ENDS))
        )
        begun = self.opened or re.match(begins, text, re.IGNORECASE)
        closed = list(re.finditer(ends, text, re.IGNORECASE))
        if closed and (begun or self.tags):
            text = text[closed[-1].end() :].lstrip()
        elif begun:
            return ""
        text = text.removeprefix(self.lead.strip())
        ends = rf"(?:{self.special.pattern}|\s)*" if self.special else r"\s*"
        return re.sub(rf"{re.escape(self.tail)}{ends}$", "", text) if self.tail else text

    def begun(self, text: str) -> int:
        """Return how many characters at the end of a text may be what is none of the answer."""
        if self.lead.strip().startswith(text):
            return len(text)
        ends = (*self.stops, self.tail)
        return max(
            (n for one in ends for n in range(len(one)) if text.endswith(one[:n])), default=0
        )

    def with_ends(self, own: int | Sequence[int] | None) -> int | list[int] | None:
        """Return ids that end a generation: a base's own, and those that end an answer."""
        known = [own] if isinstance(own, int) else list(own or ())
        more = [one for one in self.ends if one not in known]
        return [*known, *more] if more else own  # type: ignore[return-value]


def learn(transcript: Callable[[list[dict[str, str]]], Transcript]) -> Answers:
    """Learn how a template's answers look, by writing some.

    Args:
        transcript: Makes that of a conversation.
    """
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": MARKER}
    try:
        plain = transcript([question, answer])
        text, prompt = plain.tokens.text, plain.render([question], add_generation_prompt=True)
    except UsageError:
        return Answers()  # it wants other turns than these
    lead = _between(text, prompt, MARKER)
    found = [_tags(plain, [question, {**answer, key: _THOUGHT}], prompt) for key in THOUGHTS]
    found.append(tuple(lead.split()) if re.match(_BEGINS, lead, re.IGNORECASE) else ())
    tags = tuple({(pair[0], pair[1]): None for pair in found if len(pair) == 2})
    written = lead + "".join(map("".join, tags))
    closing = closing_of(plain, 1, plain.where)
    tail = re.sub(rf"(?:{plain.copies.added_tokens.pattern})$", "", closing.last).strip()
    tail = "" if tail == closing.last else tail  # a text to stop at
    opened = re.search(rf"{_BEGINS}\s*$", prompt, re.IGNORECASE) is not None
    added = [one.content for one in plain.tokenizer.added_tokens_decoder.values() if one.special]
    special = {one for one in (*added, *plain.tokenizer.all_special_tokens) if one.strip()}
    hides = any(one in written or re.fullmatch(_BEGINS, one, re.IGNORECASE) for one in special)
    names = "|".join(sorted(map(re.escape, special), key=len, reverse=True))
    seen = re.compile(names) if hides else None
    for end in (*(pair[1] for pair in tags), *re.findall(_ENDS, lead, re.IGNORECASE)):
        lead = lead.rpartition(end)[2]
    return Answers(*_ends(plain, closing, written), lead, tail, tags, opened, seen, plain.tokenizer)


def _between(text: str, start: str, end: str) -> str:
    at = text.find(end, len(start))
    return text[len(start) : at] if at >= 0 and text.startswith(start) else ""


def _tags(plain: Transcript, messages: list[dict[str, str]], prompt: str) -> tuple[str, ...]:
    """Return what the template writes before and after the reasoning of an answer, if it does."""
    try:
        text = plain.render(messages)
    except UsageError:
        return ()
    pair = _between(text, prompt, _THOUGHT), text.partition(_THOUGHT)[2].partition(MARKER)[0]
    return tuple(one.strip() for one in pair if one.strip())


def _ends(
    plain: Transcript, closing: Closing, written: str
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return ids and texts that end an answer, of which none stands before one as well."""
    ids, stops = [], []
    for text in dict.fromkeys((closing.last, closing.inner)):
        token = re.search(rf"(?:{plain.copies.added_tokens.pattern})$", text)
        if token and token.group() not in written:
            ids.append(plain.tokenizer.convert_tokens_to_ids(token.group()))
        elif text and not token:
            stops.append(text)
    if not closing.last and isinstance(plain.tokenizer.eos_token_id, int):
        ids.append(plain.tokenizer.eos_token_id)  # what is supervised instead; see `supervise`
    return tuple(dict.fromkeys(ids)), tuple(stops)
