"""A graft's processor as transformers' pipelines and servers call one."""

import copy
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from transformers import BatchFeature, ProcessorMixin

from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.chat.template import check_template, source_of
from mmgraft.data.chat.transcript import STOCK_SENTINEL
from mmgraft.data.chat.turns import is_image
from mmgraft.errors import UsageError

#: Rows are padded to the longest, on the left, and are torch's tensors.
_IN_ANY_CASE = ("padding", "return_tensors")
_NOT_TAKEN = (
    "chat_template", "continue_final_message", "processor_kwargs", "truncation",
    "load_audio_from_video",
)  # fmt: skip


class GraftedProcessor(ProcessorMixin):
    """Texts with images, and chats, as inputs of a grafted model.

    A text is a whole prompt, ``<image>`` in it an image; beside images and without that word it is
    a user's turn, after the images.

    Args:
        processor: The graft's own.
    """

    def __init__(self, processor: GraftProcessor) -> None:
        self.processor = processor
        self.tokenizer: Any = processor.tokenizer
        self.chat_template = source_of(processor.template, processor.tokenizer) or None
        self.image_token = processor.decode([processor.placeholder_id], skip_special_tokens=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.tokenizer!r})"

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: Any = None, text: Any = None, **options: Any
    ) -> BatchFeature:
        """Tokenise texts and open their images.

        Args:
            images: Of one text an image or a list of them, of several a list for each.
            text: One or several.
            **options: What does not hold in any case is refused.

        Raises:
            UsageError: A text has not a place for each of its images.
        """
        if refused := _kept(options):
            raise UsageError(f"a graft's processor takes no {', '.join(refused)}; leave it out")
        texts = _listed(text or "")
        lists = [[]] * len(texts) if images is None else _listed(images)
        if len(texts) == 1 and not isinstance(lists[0], list | tuple):
            lists = [lists]
        if len(lists) != len(texts):
            raise UsageError(f"{len(texts)} texts, images of {len(lists)}: give a list for each")
        rows = [self._row(*both) for both in zip(texts, map(_listed, lists), strict=True)]
        return BatchFeature(self.processor.inputs(rows, "left"))

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        conversation: Sequence[Any],
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        **options: Any,
    ) -> Any:
        """Write a conversation, or several, by the graft's template.

        Args:
            conversation: Messages, images in them as parts.
            add_generation_prompt: End with the header of an answer.
            tools: For the template.
            tokenize: Return inputs of the model; else the text, with ``<image>`` for an image.
            return_dict: Return all inputs, not the ids alone.
            **options: Variables of the template.

        Raises:
            UsageError: The template refuses it, or an image cannot be read.
        """
        own = copy.copy(self.processor)
        own.options = {**own.options, **_kept(options)}
        check_template(own.template, own.tokenizer, own.options)
        if tokenize:
            inputs = own(conversation, "left", add_generation_prompt, tools)
            return BatchFeature(inputs) if return_dict else inputs["input_ids"]
        if isinstance(conversation[0], Mapping):
            return _written(own, conversation, add_generation_prompt, tools)
        return [_written(own, one, add_generation_prompt, tools) for one in conversation]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Return the texts of generated rows, without what ended an answer."""
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens, **kwargs)
        return [reduce(str.removesuffix, self.processor.answers.stops, text) for text in texts]

    def _row(self, text: str, images: list[Any]) -> Encoded:
        if images and STOCK_SENTINEL not in text:
            if text.count(self.image_token) != len(images):
                parts = [{"type": "image", "image": image} for image in images]
                content = [*parts, {"type": "text", "text": text}]
                return self.processor.encode([{"role": "user", "content": content}])
            text = text.replace(self.image_token, STOCK_SENTINEL)
        return self.processor.encode_prompt(text, images)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _kept(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that ask for something."""
    asked = {name: value for name, value in options.items() if name not in _IN_ANY_CASE}
    return {name: value for name, value in asked.items() if value or name not in _NOT_TAKEN}


def _written(own: GraftProcessor, turns: Sequence[Any], prompting: bool, tools: Any) -> str:
    """Return a conversation's text, whether or not its images are there."""

    def shown(content: Any) -> Any:
        image = {"type": "image", "image": STOCK_SENTINEL}
        listed = isinstance(content, list | tuple)
        return [image if is_image(one) else one for one in content] if listed else content

    turns = [{**turn, "content": shown(turn.get("content"))} for turn in turns]
    if own.transcript(turns, tools).sentinel not in (None, STOCK_SENTINEL):
        raise UsageError(f"a text has the word {STOCK_SENTINEL} of its own: give tokenize=True")
    return own.prompt(turns, prompting, tools)
