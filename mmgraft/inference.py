"""Answer with a grafted model: a model with its processor, batches of answers, a dialogue."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache
from transformers.generation.streamers import TextStreamer
from typing_extensions import Self

from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.images import open_images
from mmgraft.errors import UsageError
from mmgraft.model.files.load import Verify, base_files, graft_folder
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.workflow import TEXT_WORKFLOW

Message = Mapping[str, Any]


@dataclass
class Answerer:
    """A grafted model and the processor that belongs to it.

    Attributes:
        reasoning: Give answers with the reasoning before them, as they were generated.
    """

    model: GraftedModel
    processor: GraftProcessor
    reasoning: bool = False

    def __post_init__(self) -> None:
        """Let the model end where the processor's template ends an answer."""
        self.model.answers = self.processor.answers

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        quantization: str | None = None,
        base: str | None = None,
        verify: Verify = "fast",
        revision: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Load a graft by folder or Hub id; see :meth:`GraftedModel.from_pretrained`.

        ``options`` are variables of the chat template.
        """
        folder = graft_folder(run, revision)
        model = GraftedModel.from_pretrained(
            folder,
            device_map={"": device} if device != "cpu" or quantization else None,
            dtype=dtype,
            quantization=quantization,
            base=base,
            verify=verify,
        )
        files = base_files(model.workflow().record, folder, base)
        return cls(model, model.processor(files.path, options=options))

    def settings(self, **given: Any) -> dict[str, Any]:
        """Return settings of ``generate`` with a padding id, without those that are None.

        Raises:
            UsageError: One is nan or infinite.
        """
        settings = {name: value for name, value in given.items() if value is not None}
        for name, value in settings.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{name} is {value}; give a finite number")
        settings.setdefault("pad_token_id", self.processor.pad_id)
        return settings

    def generating(self, settings: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Return what to generate in: where nothing is sampled the likeliest token is taken."""
        sampled = settings.get("do_sample")
        return nullcontext() if sampled is None else self.model.greedy(sampled)

    def text(self, ids: Sequence[int] | torch.Tensor) -> str:
        """Return the text of generated ids: the answer, with its reasoning if that is wanted."""
        return self.processor.decode(ids).strip() if self.reasoning else self.processor.answer(ids)

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        workflow: str | None = None,
        tools: Sequence[Any] | None = None,
        **settings: Any,
    ) -> list[str]:
        """Answer a batch of conversations, each ending with a user's turn.

        Args:
            conversations: As for :meth:`GraftProcessor.encode`.
            workflow: For all rows; by default rows with an image run the graft's.
            tools: For the chat template: the same for all, or a list (or None) for each.
            **settings: Of transformers' ``generate``, such as ``max_new_tokens``.

        Returns:
            The answers' texts, in order.
        """
        inputs = self.processor(list(conversations), padding_side="left", tools=tools)
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode(), self.generating(settings):
            out = self.model.generate(**inputs, workflow=workflow, **self.settings(**settings))
        return [self.text(row[length:]) for row in out]


@dataclass
class Dialogue:
    """A conversation with a model, turn by turn.

    What the cache holds is used again as far as the new prompt begins with it. A first image in a
    dialogue that began as text goes on from the cache too where text before an image is read as the
    base reads it (:attr:`Graft.continues_text`); else all is read anew. Either way an answer is
    what a fresh run of the whole dialogue gives.
    """

    answerer: Answerer
    system: str | None = None
    workflow: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[Any] = field(default_factory=list)  # images for the next turn
    _cache: Cache | None = None
    _seen: tuple[list[int], list[int], list[Any]] | None = None  # ids, kinds, images in the cache

    def add_image(self, image: Any) -> None:
        """Show an image (path or PIL image) with the next turn.

        Raises:
            UsageError: It is missing or broken; nothing changes.
        """
        open_images([image], "the dialogue")
        self.waiting.append(image)

    def clear(self) -> None:
        """Forget all turns."""
        self.messages, self.waiting = [], []
        self._cache = self._seen = None

    def say(self, text: str, on_text: Callable[[str], None] | None = None, **settings: Any) -> str:
        """Take a user's turn and give the answer.

        Args:
            text: What the user says.
            on_text: Called with each piece of the answer as it comes.
            **settings: Of transformers' ``generate``.

        Raises:
            UsageError: The template or the graft refuses the dialogue; the turn is not kept.
        """
        content: Any = text
        if self.waiting:
            parts = [{"type": "image", "image": image} for image in self.waiting]
            content = [*parts, {"type": "text", "text": text}]
        turn = {"role": "user", "content": content}
        start = [{"role": "system", "content": self.system}] if self.system else []
        encoded = self.answerer.processor.encode([*start, *self.messages, turn])
        answer = self._generate(encoded, on_text, settings)
        said = self.answerer.processor.answers.shown(answer).strip()
        self.messages += [turn, {"role": "assistant", "content": said}]
        self.waiting = []
        return answer

    def _generate(
        self, encoded: Encoded, on_text: Callable[[str], None] | None, settings: dict[str, Any]
    ) -> str:
        processor, model = self.answerer.processor, self.answerer.model
        inputs: dict[str, Any] = processor.inputs([encoded], "left", ["the dialogue"])
        workflow = self.workflow or (None if encoded.images else TEXT_WORKFLOW)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        cache = self._reusable(encoded)
        self._cache = self._seen = None  # a run that fails leaves its cache longer than was noted
        if cache is not None:
            inputs["past_key_values"] = cache
        elif self._caches(workflow):
            inputs["past_key_values"] = cache = DynamicCache(config=model.base.config)
        if on_text is not None:
            inputs["streamer"] = AnswerStreamer(self.answerer, on_text)
        with torch.inference_mode(), self.answerer.generating(settings):
            out = model.generate(**inputs, workflow=workflow, **self.answerer.settings(**settings))
        ids = out[0].tolist()
        rows = 0 if cache is None else cast(Any, cache).layers[0].keys.shape[0]
        if cache is not None and rows == 1:  # else beams or samples
            held = int(cache.get_seq_length())
            kinds = encoded.kinds + [0] * (len(ids) - len(encoded.kinds))
            self._cache = cache
            self._seen = (ids[:held], kinds[:held], list(encoded.images))
        return self.answerer.text(ids[len(encoded.input_ids) :])

    def _caches(self, workflow: str | None) -> bool:
        if workflow == TEXT_WORKFLOW:
            return True
        return not self.answerer.model.workflow(workflow).graft.promises.cache

    def _reusable(self, encoded: Encoded) -> Cache | None:
        """Return the cache, if the new prompt begins with all that it holds and goes beyond it."""
        if self._cache is None or self._seen is None:
            return None
        ids, kinds, images = self._seen
        longer = len(encoded.input_ids) > len(ids)
        same = encoded.input_ids[: len(ids)] == ids and encoded.kinds[: len(kinds)] == kinds
        if encoded.images and not images and self.workflow is None:  # it began as text
            same = same and self.answerer.model.workflow().graft.continues_text
        same_images = list(encoded.images[: len(images)]) == images
        return self._cache if longer and same and same_images else None


class AnswerStreamer(TextStreamer):
    """Hands pieces of the answer on, without the prompt, without reasoning and without its end.

    Args:
        answerer: Its processor knows how answers look.
        on_text: Called with each piece.
        stops: Texts that end this answer, beside the template's.
    """

    def __init__(
        self, answerer: Answerer, on_text: Callable[[str], None], stops: Sequence[str] = ()
    ) -> None:
        own = answerer.processor.answers
        self._answers, self._raw = replace(own, stops=(*own.stops, *stops)), answerer.reasoning
        self._special = None if self._raw else self._answers.special
        tokenizer = answerer.processor.tokenizer
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=self._special is None)
        self._on_text = on_text
        self._text = self._sent = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._text += text
        shown = self._text if self._raw else self._answers.shown(self._text)
        if self._special is not None:
            shown = self._special.sub("", shown)
        if not stream_end:  # the beginning of what may become a stop waits
            shown = shown[: len(shown) - self._answers.begun(shown)]
        if len(shown) > len(self._sent):
            self._on_text(shown[len(self._sent) :])
            self._sent = shown


def prompt_of(messages: Sequence[dict[str, Any]], where: str) -> Sequence[dict[str, Any]]:
    """Return a row's messages up to the last user's turn; an answer at the end is not shown.

    Raises:
        UsageError: The row asks nothing.
    """
    end = len(messages)
    while end and messages[end - 1].get("role") != "user":
        end -= 1
    if not end:
        raise UsageError(f"{where}: no turn of a user to answer; add one")
    return list(messages[:end])
