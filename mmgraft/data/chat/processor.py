"""Messages in, tensors out. Text is tokenised exactly as the base's own tokenizer would.

Conversations of which a chat template would leave something out are refused.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from mmgraft.data.batches.sequences import Side, pad
from mmgraft.data.chat import transcript as transcripts
from mmgraft.data.chat.answers import Answers, learn
from mmgraft.data.chat.template import Template, check_template, reads_parts, variables
from mmgraft.data.chat.turns import THOUGHTS, Message, clean, flatten, has_parts
from mmgraft.data.images import open_images, size_of
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.vision.plan import ImagePositions

_THINKS = {"reasoning_content", "thinking"}
_TEXTS = ("content", *_THINKS)


def refuse_dropped(transcript: transcripts.Transcript) -> None:
    """Refuse a conversation of which the template leaves something out.

    Looked for are the content of every turn, its calls of tools, its reasoning, and the tools. What
    is written of one conversation is written of all whose turns are of the same kinds.

    Raises:
        UsageError: It names the turn and what is left out.
    """
    turns = [(t["role"], *(key for key, value in t.items() if value)) for t in transcript.messages]
    kinds = (bool(transcript.tools), *turns)
    if kinds in transcript.copies.written:
        return
    for lacks in _dropped(transcript):
        raise UsageError(
            f"{transcript.where}{lacks}; take it out, or graft with a template that does "
            "(--template FILE.jinja)"
        )
    transcript.copies.written.add(kinds)


def _dropped(transcript: transcripts.Transcript) -> Iterator[str]:
    text = transcript.render()
    if transcript.tools and replace(transcript, tools=None).render() == text:
        yield ": the chat template does not write the row's 'tools'"
    marker = transcripts.unused_marker(text)
    turns = list(enumerate(transcript.messages, start=1))
    try:
        marked = transcript.render([_marked(turn, f"{marker}{at}") for at, turn in turns])
    except UsageError:
        return  # the template reads what the turns say
    reads = re.search(rf"[.'\"](?:{'|'.join(THOUGHTS)})\b", transcript.source)
    for at, turn in turns:
        written = {key for key in (*_TEXTS, "tool_calls") if f"{marker}{at}{key};" in marked}
        if written & _THINKS or (reads and at < len(turns)):  # of earlier turns it may go
            written |= _THINKS
        for key in ("content", "reasoning_content", "tool_calls"):
            if key not in written and str(turn.get(key) or "").strip():
                yield (
                    f", turn {at}: the chat template does not write the {key!r} of this turn of "
                    f"the {turn['role']}"
                )


def _marked(turn: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """Return a turn with marks in its texts and in the names of its calls."""
    made = _with_calls(turn, lambda call: {"name": f"{call['name']}{mark}tool_calls;"})
    texts = [key for key in _TEXTS if str(made.get(key) or "").strip()]
    return {**made, **{key: f"{made[key]}{mark}{key};" for key in texts}}


def takes_text(transcript: transcripts.Transcript) -> bool:
    """Tell whether the template takes the arguments of calls as JSON text, not as objects.

    It does where it cannot write objects, or writes them as Python does.
    """
    calls = [call for turn in transcript.messages for call in turn.get("tool_calls") or ()]
    given = [call.get("function", call)["arguments"] for call in calls]
    try:
        text = transcript.render() if given else ""
    except UsageError:
        return True  # what else is wrong is said of the text
    return any(one and repr(one) in text for one in given)


def with_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return turns whose calls have JSON text for arguments."""

    def changed(call: dict[str, Any]) -> dict[str, Any]:
        return {"arguments": json.dumps(call["arguments"], ensure_ascii=False)}

    return [_with_calls(turn, changed) for turn in messages]


def _with_calls(
    turn: Mapping[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Return a turn whose calls of tools have something changed."""
    calls = []
    for call in turn.get("tool_calls") or ():
        inner = call.get("function", call)
        inner = {**inner, **change(inner)}
        calls.append({**call, "function": inner} if "function" in call else inner)
    return {**turn, "tool_calls": calls} if calls else dict(turn)


#: A vision tower's ``preprocess``.
Preprocess = Callable[[Sequence[Image.Image]], Tensor]


class Encoded(Frozen):
    """One conversation as ids.

    Attributes:
        input_ids: The ids; where an image stands, the placeholder at each of its positions.
        kinds: The row's ``mm_token_type_ids``: 1 at an image's positions, 0 at text.
        images: What the image parts held (paths, data URIs, PIL images), in order of appearance.
        spans: First and past-the-last position of everything to learn; only ``supervise`` fills it.
        lengths: Positions of each image.
        sizes: Width and height of each image, where its positions depend on them.
    """

    input_ids: list[int]
    kinds: list[int]
    images: list[Any]
    spans: tuple[tuple[int, int], ...] = ()
    lengths: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()

    def part(self, start: int, end: int | None = None) -> "Encoded":
        """Return the positions from ``start`` up to ``end``, with the images whole in them."""
        end = len(self) if end is None else end
        at = list(accumulate(self.lengths, initial=0))
        first, last = sum(self.kinds[:start]), sum(self.kinds[:end])
        kept = [n for n in range(len(self.images)) if first <= at[n] and at[n + 1] <= last]
        chosen = slice(kept[0], kept[-1] + 1) if kept else slice(0)
        spans = ((max(a, start) - start, min(b, end) - start) for a, b in self.spans)
        return Encoded(
            self.input_ids[start:end],
            self.kinds[start:end],
            self.images[chosen],
            tuple((a, b) for a, b in spans if a < b),
            self.lengths[chosen],
            self.sizes[chosen],
        )

    @property
    def labels(self) -> list[int]:
        """The ids to learn at their own positions, -100 at all others; never an image's."""
        labels = [-100] * len(self.input_ids)
        for start, end in self.spans:
            for at in range(start, end):
                if self.kinds[at] == 0:
                    labels[at] = self.input_ids[at]
        return labels

    def __len__(self) -> int:
        return len(self.input_ids)


class GraftProcessor:
    """Turns conversations with images into what a grafted model's forward takes.

    A conversation without an image part gives the ids of the base's untouched tokenizer and
    template, whatever its text says: "<image>", the placeholder's own text or anything else. Only
    image parts make image positions, and ``mm_token_type_ids`` alone tells them apart.

    Text around images is tokenised by a copy of the tokenizer in which a sentinel that the text
    does not contain stands for an image, which is how transformers' ``LlavaProcessor`` splits it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_positions: ImagePositions | int,
        placeholder_id: int,
        template: Template | str = "chat",
        preprocess: Preprocess | None = None,
        options: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
    ):
        """Bind the base's tokenizer to what an image takes.

        Args:
            tokenizer: The base's; it is never changed.
            image_positions: How many positions an image takes, from its size; a number is that of
                every image.
            placeholder_id: Fills them; see ``choose_placeholder``.
            template: A ``Template``, or one of the kinds that need no text.
            preprocess: The vision tower's; without it ``__call__`` takes no images.
            options: Variables of the chat template, such as ``enable_thinking``.
            vocab_size: Rows of the base's embedding, where they are known; a text with a token
                past them is refused.

        Raises:
            UsageError: The template does not know an option, or no template is chosen of several.
        """
        if isinstance(template, str):
            if template not in ("chat", "plain"):
                raise UsageError(f"template {template!r}: resolve it with resolve_template first")
            template = Template("plain" if template == "plain" else "chat")
        self.tokenizer = tokenizer
        if isinstance(image_positions, int):
            image_positions = ImagePositions.same(image_positions)
        self.image_positions = image_positions
        self.placeholder_id = placeholder_id
        self.template = template
        self.preprocess = preprocess
        self.options = dict(options or {})
        self.vocab_size = vocab_size
        check_template(template, tokenizer, self.options)
        self._copies = transcripts.SentinelTokenizers(tokenizer)
        self._reads_parts: bool | None = None

    def with_template(self, template: Template | str) -> Self:
        """Return the same processor with another template, and the options that it knows."""
        images = self.image_positions, self.placeholder_id
        made = type(self)(self.tokenizer, *images, template, self.preprocess)
        known = variables(made.template, self.tokenizer) if self.options else set[str]()
        made.options = {name: self.options[name] for name in self.options if name in known}
        made.vocab_size = self.vocab_size
        return made

    def transcript(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        where: str = "the conversation",
    ) -> transcripts.Transcript:
        """Return the conversation as its template and tokenizer see it; see ``Transcript``.

        Raises:
            UsageError: The template refuses it, or leaves something of it out.
        """
        return self._read(messages, tools, where)[1]

    def _read(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        where: str,
        prompting: bool = False,
    ) -> tuple[list[dict[str, Any]], transcripts.Transcript]:
        """Return the messages as the template takes them, and their transcript."""
        messages = clean(messages, where)
        flat, images = flatten(messages, transcripts.STOCK_SENTINEL, where)
        plain = transcripts.Transcript(
            flat, images, self.template, self._copies, self.tokenizer, tools, self.options,
            where=where, prompting=prompting,
        )  # fmt: skip
        if takes_text(plain):
            messages, plain = with_text(messages), replace(plain, messages=with_text(flat))
        transcript = transcripts.with_sentinel(plain, messages) if images else plain
        refuse_dropped(transcript)
        return messages, transcript

    @cached_property
    def answers(self) -> Answers:
        """Answers as the template writes them: the end of one, and the reasoning before it."""
        return learn(self.transcript)

    def prompt(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        where: str = "the conversation",
    ) -> str:
        """Return the text that is tokenised: the base's own, or with a sentinel for each image."""
        return self._text(*self._read(messages, tools, where, add_generation_prompt), where)

    def _text(
        self, messages: Sequence[Message], transcript: transcripts.Transcript, where: str
    ) -> str:
        if transcript.images:
            return transcript.tokens.text
        return transcript.render(self._text_only(messages, where), transcript.prompting)

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        where: str = "the conversation",
    ) -> Encoded:
        """Tokenise one conversation; images are not opened.

        Args:
            messages: ``{"role", "content"}``, content a text or a list of text and image parts.
            add_generation_prompt: End with the header of an answer.
            tools: For the chat template.
            where: Names the row in errors.

        Raises:
            UsageError: The template refuses the conversation.
        """
        messages, transcript = self._read(messages, tools, where, add_generation_prompt)
        if transcript.images:
            return self.expand(transcript, transcript.tokens.ids)
        text, plain = self._text(messages, transcript, where), self.template.kind == "plain"
        ids = list(self.tokenizer(text, add_special_tokens=plain, verbose=False)["input_ids"])
        self.check_ids(ids, where)
        return Encoded(ids, [0] * len(ids), [])

    def encode_prompt(self, text: str, images: Sequence[Any] = ()) -> Encoded:
        """Tokenise a whole prompt as it stands, each ``<image>`` in it an image.

        What the tokenizer puts before a text is put there unless the prompt has it.

        Raises:
            UsageError: It has another number of them than there are images.
        """
        marks = text.count(transcripts.STOCK_SENTINEL)
        if images and marks != len(images):
            raise UsageError(
                f"the prompt: {len(images)} images and {marks} times {transcripts.STOCK_SENTINEL}; "
                "write it where each image stands"
            )
        sentinel, tokenizer, index = transcripts.STOCK_SENTINEL, self.tokenizer, None
        if images:
            sentinel, tokenizer, index = transcripts.unused_sentinel(self._copies, text)
            text = text.replace(transcripts.STOCK_SENTINEL, sentinel)
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        prefix = self._copies.prefix
        given = transcripts.Transcript(
            [], list(images), self.template, self._copies, tokenizer, where="the prompt"
        )
        transcript = replace(given, sentinel=sentinel, sentinel_id=index)
        return self.expand(transcript, ids if ids[: len(prefix)] == prefix else [*prefix, *ids])

    def expand(
        self,
        transcript: transcripts.Transcript,
        ids: Sequence[int],
        spans: Sequence[tuple[int, int]] = (),
    ) -> Encoded:
        """Give every sentinel the positions of an image, and move the spans along."""
        self.check_ids(
            [index for index in ids if index != transcript.sentinel_id], transcript.where
        )
        lengths, sizes = self._measure(transcript)
        input_ids: list[int] = []
        kinds: list[int] = []
        at = [0]  # where each id of `ids` begins, and the end
        queue = iter(lengths)
        for index in ids:
            if index == transcript.sentinel_id:
                length = next(queue)
                input_ids += [self.placeholder_id] * length
                kinds += [1] * length
            else:
                input_ids.append(index)
                kinds.append(0)
            at.append(len(input_ids))
        moved = tuple((at[start], at[end]) for start, end in spans)
        return Encoded(input_ids, kinds, transcript.images, moved, lengths, sizes)

    def check_ids(self, ids: Sequence[int], where: str) -> None:
        """Raise UsageError for a token that the base's embedding has no row for."""
        last = max(ids, default=0)
        if self.vocab_size is not None and last >= self.vocab_size:
            raise UsageError(
                f"{where}: token {last} ({self.tokenizer.convert_ids_to_tokens(last)}) is past the "
                f"base's embedding of {self.vocab_size} rows: tokenizer and base do not belong "
                "together, or a token was added; give the base's own tokenizer, or leave it out"
            )

    def _measure(
        self, transcript: transcripts.Transcript
    ) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Positions of each image, and its size where they depend on it."""
        fixed = self.image_positions.fixed
        if fixed is not None:
            return (fixed,) * len(transcript.images), ()
        sizes = tuple(size_of(image, transcript.where) for image in transcript.images)
        return tuple(map(self.image_positions, sizes)), sizes

    def __call__(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        padding_side: Side = "left",
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
    ) -> dict[str, Tensor]:
        """Tokenise a batch and open its images.

        Args:
            conversations: A list of conversations, or one conversation.
            padding_side: "left" for generation, "right" for training.
            add_generation_prompt: End with the header of an answer.
            tools: For the chat template, the same for all; or a list (or None) for each.

        Returns:
            What ``collate`` gives; with images also their pixel_values, in order of appearance.

        Raises:
            UsageError: A template refuses a conversation, or an image cannot be read.
        """
        batch: Any = conversations
        if batch and isinstance(batch[0], Mapping):
            batch = [batch]
        if not batch:
            raise UsageError("no conversation to process; give at least one")
        names = ["the conversation"] if len(batch) == 1 else []
        names = names or [f"conversation {number}" for number in range(1, len(batch) + 1)]
        own = any(one is None or isinstance(one, list | tuple) for one in tools or ())
        each: Sequence[Any] = tools if own and tools is not None else [tools] * len(batch)
        rows = [
            self.encode(messages, add_generation_prompt, given, where)
            for messages, given, where in zip(batch, each, names, strict=True)
        ]
        return self.inputs(rows, padding_side, names)

    def inputs(
        self, rows: Sequence[Encoded], padding_side: Side, names: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """Pad rows to one length and open their images; ``names`` are those of the rows."""
        inputs = self.collate(rows, padding_side)
        called = zip(rows, names or ["the conversation"] * len(rows), strict=True)
        images = [image for row, where in called for image in open_images(row.images, where)]
        if images:
            inputs["pixel_values"] = self.pixels(images)
        return inputs

    def collate(
        self, rows: Sequence[Encoded], padding_side: Side, multiple: int = 1
    ) -> dict[str, Tensor]:
        """Pad rows to one length: what ``pad`` gives, and with images what ``images_of`` gives."""
        return {**self.pad(rows, padding_side, multiple), **self.images_of(rows)}

    def pad(
        self, rows: Sequence[Encoded], padding_side: Side, multiple: int = 1
    ) -> dict[str, Tensor]:
        """Pad rows to one length: input_ids, attention_mask, mm_token_type_ids, each (b, s)."""
        columns = {
            "input_ids": ([row.input_ids for row in rows], self.pad_id),
            "attention_mask": ([[1] * len(row) for row in rows], 0),
            "mm_token_type_ids": ([row.kinds for row in rows], 0),
        }
        return {
            name: pad(values, fill, padding_side, multiple)
            for name, (values, fill) in columns.items()
        }

    def images_of(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Return what a batch says of its images.

        Returns:
            ``image_lengths`` and ``image_rows`` (images,), the positions and the row of each image;
            where the tower's plan depends on an image's size also ``image_sizes`` (images, 2),
            width and height. Nothing for rows without images.
        """
        lengths = [length for row in rows for length in row.lengths]
        if not lengths:
            return {}
        owners = [number for number, row in enumerate(rows) for _ in row.lengths]
        found = {"image_lengths": torch.tensor(lengths), "image_rows": torch.tensor(owners)}
        sizes = [size for row in rows for size in row.sizes]
        return {**found, "image_sizes": torch.tensor(sizes)} if sizes else found

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the vision tower's input, (n, 3, H, W) of a tower with one plan for all images.

        Raises:
            UsageError: The processor was made without a tower's ``preprocess``.
        """
        if self.preprocess is None:
            raise UsageError(
                "this processor has no image preprocessing; make it with a vision tower's"
            )
        return self.preprocess(images)

    @property
    def pad_id(self) -> int:
        """The id of padding: the tokenizer's, else its end of sequence, else 0. It is masked."""
        known = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return next((index for index in known if isinstance(index, int)), 0)

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """Return the text of generated ids, by the base's tokenizer."""
        if isinstance(ids, Tensor):
            ids = ids.tolist()
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def answer(self, ids: Sequence[int] | Tensor) -> str:
        """Return the answer in generated ids: what comes after reasoning, without special tokens.

        Reasoning that does not end has no answer after it.
        """
        text = self.decode(ids)
        special = self.answers.special
        if special is None:
            return self.answers.shown(text).strip()
        whole = self.decode(ids, skip_special_tokens=False)
        shown = self.answers.shown(whole)
        return (text if shown == whole.lstrip() else special.sub("", shown)).strip()

    def _text_only(self, messages: Sequence[Message], where: str) -> Sequence[Message]:
        """Return the messages, flattened unless the template reads lists of parts."""
        if not has_parts(messages):
            return messages
        if self._reads_parts is None:
            self._reads_parts = reads_parts(self.template, self.tokenizer)
        return messages if self._reads_parts else flatten(messages, "", where)[0]
