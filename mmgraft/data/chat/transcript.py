"""A conversation as the template and the tokenizer see it: every image a sentinel token."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from mmgraft.data.chat.content import Message, flatten, strings_in
from mmgraft.data.chat.template import Template, render, source_of
from mmgraft.errors import UsageError

STOCK_SENTINEL = "<image>"
"""What transformers' `LlavaProcessor` calls it; the first choice, so that prompts look familiar."""

_TRIES = 8


def _sentinels() -> Iterator[str]:
    # None can overlap itself, and they begin differently: a token of the base that swallows the
    # first character of one leaves the others alone.
    yield from (STOCK_SENTINEL, "[image]", "\ue000image\ue001")
    for number in range(_TRIES):
        yield f"\ue000image {number}\ue001"


@dataclass
class Learnt:
    """What was found out once about a tokenizer and its template, for all conversations."""

    prefix: list[int] | None = None
    added_tokens: re.Pattern[str] | None = None
    closings: dict[str, Any] = field(default_factory=dict)


class SentinelTokenizers:
    """Copies of a tokenizer, each with one more token that stands for an image.

    The tokenizer itself is never touched: adding `<image>` to it would turn the ordinary words "an
    <image> tag" into an id past the vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.learnt = Learnt()
        self._copies: dict[str, tuple[PreTrainedTokenizerBase, int]] = {}

    def get(self, sentinel: str) -> tuple[PreTrainedTokenizerBase, int] | None:
        """A copy that knows the sentinel, and its id; None where the base has such a token."""
        if sentinel not in self._copies:
            if self.tokenizer.convert_tokens_to_ids(sentinel) not in (
                None,
                self.tokenizer.unk_token_id,
            ):
                return None
            clone = copy.deepcopy(self.tokenizer)
            clone.add_tokens(
                [AddedToken(sentinel, special=True, normalized=False)], special_tokens=True
            )
            index = clone.convert_tokens_to_ids(sentinel)
            assert isinstance(index, int)
            self._copies[sentinel] = (clone, index)
        return self._copies[sentinel]


@dataclass
class Transcript:
    """A conversation, flattened, with all that is needed to write and tokenise pieces of it.

    Attributes:
        messages: contents are texts, images are sentinels.
        images: what the image parts held, in order.
        base: the base's tokenizer.
        tokenizer: the same where there is no image, else a copy that knows the sentinel.
        sentinel: stands for an image; None where there is none.
        sentinel_id: its id, which no text has.
        where: names the row in errors.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    template: Template
    base: PreTrainedTokenizerBase
    tokenizer: PreTrainedTokenizerBase
    learnt: Learnt
    tools: Sequence[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    sentinel: str | None = None
    sentinel_id: int | None = None
    where: str = "the conversation"

    def render(
        self, messages: Sequence[Message] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of the conversation, or of other messages by the same rules."""
        return render(
            self.template,
            self.tokenizer,
            self.messages if messages is None else messages,
            tools=self.tools,
            add_generation_prompt=add_generation_prompt,
            options=self.options,
            sentinel=self.sentinel,
            where=self.where,
        )

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered text, an image one id.

        A chat template writes its own special tokens. Plain text gets those that the tokenizer puts
        before a text (a beginning-of-sequence token), not those it may put after it.
        """
        bare = _encode(self.tokenizer, text, special=False)
        if self.template.kind != "plain":
            return bare
        if self.learnt.prefix is None:
            self.learnt.prefix = _prefix(self.base)
        return self.learnt.prefix + bare

    @property
    def source(self) -> str:
        """The jinja text in use; empty for plain text."""
        return source_of(self.template, self.tokenizer, self.tools)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    encoding = tokenizer(text, add_special_tokens=special, verbose=False)
    return list(encoding["input_ids"])


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text of its own accord."""
    probe = _encode(tokenizer, "a", special=False)
    whole = _encode(tokenizer, "a", special=True)
    for start in range(len(whole) - len(probe) + 1):
        if whole[start : start + len(probe)] == probe:
            return whole[:start]
    return []


def write_transcript(
    copies: SentinelTokenizers,
    template: Template,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    where: str = "the conversation",
) -> Transcript:
    """Flatten a conversation around a sentinel that occurs nowhere in it.

    Raises:
        UsageError: where the template drops or repeats an image, refuses the conversation, or a
            content part is neither text nor image.
    """
    options = dict(options or {})
    flat, images = flatten(messages, STOCK_SENTINEL, where)
    plain = Transcript(
        messages=flat,
        images=[],
        template=template,
        base=copies.tokenizer,
        tokenizer=copies.tokenizer,
        learnt=copies.learnt,
        tools=tools,
        options=options,
        where=where,
    )
    if not images:
        return plain
    for sentinel in _sentinels():
        flat, images = flatten(messages, sentinel, where)
        if _elsewhere(sentinel, flat, len(images), tools, options):
            continue
        copied = copies.get(sentinel)
        if copied is None:
            continue
        tokenizer, index = copied
        transcript = replace(
            plain,
            messages=flat,
            images=images,
            tokenizer=tokenizer,
            sentinel=sentinel,
            sentinel_id=index,
        )
        if sentinel in transcript.source:
            continue
        found = transcript.ids(transcript.render()).count(index)
        if found == len(images):
            return transcript
    raise UsageError(
        f"{where}: the template does not write every image exactly once ({len(images)} image parts)"
        "; move the images to a user turn, or give another template"
    )


def _elsewhere(
    sentinel: str,
    flat: Sequence[Message],
    images: int,
    tools: Sequence[Any] | None,
    options: Mapping[str, Any],
) -> bool:
    """Whether the sentinel's text occurs where no image stands."""
    written = sum(text.count(sentinel) for text in strings_in(list(flat)))
    return written != images or any(
        sentinel in text for value in (list(tools or ()), options) for text in strings_in(value)
    )
