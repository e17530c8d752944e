"""A conversation as the template and the tokenizer see it: every image a sentinel token.

Where its answers end in the text, and how a template closes them, is found by writing answers.
"""

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from mmgraft.data.chat.template import Template, render, source_of
from mmgraft.data.chat.turns import Message, flatten, strings_in
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen

#: Name of transformers' ``LlavaProcessor``; the first choice, so that prompts look familiar.
STOCK_SENTINEL = "<image>"

_TRIES = 8


def _sentinels() -> Iterator[str]:
    # None can overlap itself, and they begin differently: a token of the base that swallows the
    # first character of one leaves the others alone.
    yield from (STOCK_SENTINEL, "[image]", "\ue000image\ue001")
    for number in range(_TRIES):
        yield f"\ue000image {number}\ue001"


class SentinelTokenizers:
    """Copies of a tokenizer, each with one more token that stands for an image.

    The tokenizer itself is never touched: adding ``<image>`` to it would turn the ordinary words
    "an <image> tag" into an id past the vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.closings: dict[bool, Any] = {}  # of answers, with and without tools
        self.written: set[Any] = set()  # kinds of turns that the template writes whole
        self._copies: dict[str, tuple[PreTrainedTokenizerBase, int]] = {}

    def get(self, sentinel: str) -> tuple[PreTrainedTokenizerBase, int] | None:
        """Return a copy that knows the sentinel, and its id; None if the base has such a token."""
        if sentinel not in self._copies:
            known = self.tokenizer.convert_tokens_to_ids(sentinel)
            if known not in (None, self.tokenizer.unk_token_id):
                return None
            clone = copy.deepcopy(self.tokenizer)
            clone.add_tokens(
                [AddedToken(sentinel, special=True, normalized=False)], special_tokens=True
            )
            index = clone.convert_tokens_to_ids(sentinel)
            assert isinstance(index, int)
            self._copies[sentinel] = (clone, index)
        return self._copies[sentinel]

    @cached_property
    def prefix(self) -> list[int]:
        """Ids that the tokenizer puts before a text of its own accord."""
        probe = _encode(self.tokenizer, "a", special=False)
        whole = _encode(self.tokenizer, "a", special=True)
        for start in range(len(whole) - len(probe) + 1):
            if whole[start : start + len(probe)] == probe:
                return whole[:start]
        return []

    @cached_property
    def added_tokens(self) -> re.Pattern[str]:
        """Matches the text of a special or added token, but no white space and no sentinel."""
        texts = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        texts |= set(self.tokenizer.all_special_tokens)
        names = sorted((text for text in texts if text.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")


@dataclass
class Transcript:
    """A conversation, flattened, with all that is needed to write and tokenise pieces of it.

    Attributes:
        messages: Contents are texts, images are sentinels.
        images: What the image parts held, in order.
        copies: The base's tokenizer, and copies of it.
        tokenizer: The base's where there is no image, else a copy that knows the sentinel.
        sentinel: Stands for an image; None where there is none.
        sentinel_id: Its id, which no text has.
        where: Names the row in errors.
        prompting: End with the header of an answer.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    template: Template
    copies: SentinelTokenizers
    tokenizer: PreTrainedTokenizerBase
    tools: Sequence[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    sentinel: str | None = None
    sentinel_id: int | None = None
    where: str = "the conversation"
    prompting: bool = False

    @cached_property
    def tokens(self) -> "Tokens":
        """The conversation, written and tokenised once."""
        return Tokens(self, self.render(add_generation_prompt=self.prompting))

    def render(
        self, messages: Sequence[Message] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Return the text of the conversation, or of other messages by the same rules."""
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
        """Return token ids of a rendered text, an image one id.

        A chat template writes its own special tokens. Plain text gets those that the tokenizer puts
        before a text (a beginning-of-sequence token), not those it may put after it.
        """
        return self.prefix + _encode(self.tokenizer, text, special=False)

    @property
    def prefix(self) -> list[int]:
        """Ids that the tokenizer itself puts before plain text."""
        return self.copies.prefix if self.template.kind == "plain" else []

    @property
    def source(self) -> str:
        """The jinja text in use; empty for plain text."""
        return source_of(self.template, self.tokenizer, self.tools)


class Tokens:
    """A text as ids, with the characters that each was made of.

    Attributes:
        text: As the template wrote it.
        ids: Of the whole text, an image one id.
    """

    def __init__(self, transcript: Transcript, text: str) -> None:
        self.transcript, self.text = transcript, text
        self._encoding = transcript.tokenizer(text, add_special_tokens=False, verbose=False)
        self.ids: list[int] = transcript.prefix + list(self._encoding["input_ids"])

    def before(self, end: int) -> tuple[int, bool]:
        """Count the first ids that are those of the text up to a character as well.

        An added token parts a text in two that are tokenised by themselves, so that it is enough to
        tokenise from the last one on. A tokenizer that does not say which characters its tokens
        were made of tokenises all that is before the character.

        Returns:
            How many, and whether the text up to the character has no other ids than these.
        """
        character, token = self._last_added(end)
        if character:
            own = _encode(self.transcript.tokenizer, self.text[character:end], special=False)
        else:
            own = self.transcript.ids(self.text[:end])
        shared = shared_length(own, self.ids[token : token + len(own)])
        return token + shared, shared == len(own)

    @cached_property
    def _added(self) -> list[tuple[int, int, int]]:
        """First and last character of each added token in the text, and the token's place."""
        if not self.transcript.tokenizer.is_fast:
            return []
        found: list[tuple[int, int, int]] = []
        first = len(self.transcript.prefix)
        for match in self.transcript.copies.added_tokens.finditer(self.text):
            at = self._encoding.char_to_token(match.start())
            index = self.transcript.tokenizer.convert_tokens_to_ids(match.group())
            if at is not None and self.ids[at + first] == index:
                found.append((match.start(), match.end(), at + first))
        return found

    def _last_added(self, end: int) -> tuple[int, int]:
        """Find the last added token that ends by a character: its own first one, and its place."""
        added = ((at, token) for at, stop, token in reversed(self._added) if at and stop <= end)
        return next(added, (0, 0))


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count the first items that two sequences have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    encoding = tokenizer(text, add_special_tokens=special, verbose=False)
    return list(encoding["input_ids"])


def unused_sentinel(
    copies: SentinelTokenizers, text: str
) -> tuple[str, PreTrainedTokenizerBase, int]:
    """Return a sentinel that a text does not hold, but for the first, its tokenizer and its id."""
    found = ((one, copies.get(one)) for one in _sentinels() if one not in text)
    return next((one, *copied) for one, copied in found if copied is not None)


def with_sentinel(plain: Transcript, messages: Sequence[Message]) -> Transcript:
    """Flatten a conversation around a sentinel that occurs nowhere in it.

    Args:
        plain: The conversation, flattened around any text.
        messages: The conversation itself, with images.

    Raises:
        UsageError: The template drops or repeats an image, refuses the conversation, or a content
            part is neither text nor image.
    """
    count = len(plain.images)
    for sentinel in _sentinels():
        flat, _ = flatten(messages, sentinel, plain.where)
        texts = strings_in([flat, list(plain.tools or ()), plain.options])
        if sum(text.count(sentinel) for text in texts) != count:
            continue  # it stands where no image stands
        copied = plain.copies.get(sentinel)
        if copied is None:
            continue
        transcript = replace(
            plain, messages=flat, tokenizer=copied[0], sentinel=sentinel, sentinel_id=copied[1]
        )
        if sentinel in transcript.source:
            continue
        if transcript.tokens.ids.count(copied[1]) == count:
            return transcript
    raise UsageError(
        f"{plain.where}: the template does not write every image exactly once ({count} image "
        "parts); move the images to a user turn, or give another template"
    )


#: Stands for an answer in what is written to learn from.
MARKER = "zqAnswerqz"


class Closing(Frozen):
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
    before, last = _split(transcript, messages, MARKER, where)
    header = last.rstrip()
    try:
        _, inner = _split(transcript, [*messages, {"role": "user", "content": "b"}], MARKER, where)
    except UsageError:
        inner = ""  # no user may follow here
    if header and before.rstrip().endswith(header) and inner and not inner.startswith(header):
        raise UsageError(
            f"{where}: the chat template writes the header of an answer after the last one too, "
            "asked for or not; graft with one that writes it where add_generation_prompt is set "
            "(--template FILE.jinja)"
        )
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
