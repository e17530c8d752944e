"""One name of a model, as the handlers of transformers' server ask for a model and a processor."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature, GenerationConfig

from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.inference import Answerer, AnswerStreamer
from mmgraft.model.generation import token_settings
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.serving.requests import Sampling


class Settings(GenerationConfig):
    """Settings of one answer.

    Attributes:
        seed: Of sampling.
        stops: Texts of the request that end the answer.
    """

    seed: int | None = None
    stops: tuple[str, ...] = ()


class Served(Frozen):
    """A name in ``/v1/models``, both as a model and as its processor.

    Attributes:
        name: The name.
        answerer: The model with this workflow's processor.
        workflow: A conversation with an image runs it, one without is the base's; ``text`` is the
            base alone, which takes no images.
    """

    name: str
    answerer: Answerer
    workflow: str

    # -- as a model -----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Return where inputs belong."""
        return self.answerer.model.device

    @property
    def config(self) -> Any:
        """Return the model's config."""
        return self.answerer.model.config

    @property
    def generation_config(self) -> GenerationConfig:
        """Return the base's own settings."""
        return self.answerer.model.generation_config

    def settings(self, request: Sampling) -> Settings:
        """Return the settings of a request's answer: its own, else the base's.

        Temperature 0 takes the likeliest token, whatever the base's settings change about it;
        above it those of sampling count, and beams, caches and stop strings do not.
        """
        own = self.generation_config
        # What is colder than a millionth is as greedy, and would divide scores past all numbers.
        heat = request.temperature and round(request.temperature, 6)
        kept = token_settings(own, heat != 0)
        answers = self.answerer.processor.answers
        kept.update(eos_token_id=answers.with_ends(own.eos_token_id), max_length=None)
        kept.update(pad_token_id=self.answerer.processor.pad_id, max_new_tokens=request.tokens)
        kept["do_sample"] = bool(own.do_sample if heat is None else heat)
        given = {"temperature": heat, "top_p": request.top_p}
        kept.update({name: value for name, value in given.items() if value})
        if request.logit_bias:
            known = self.answerer.model.anatomy.vocab_size
            if max(request.logit_bias) >= known:
                raise UsageError(f"'logit_bias': the model has tokens 0 to {known - 1} alone")
            kept["sequence_bias"] = {(token,): bias for token, bias in request.logit_bias.items()}
        settings = Settings(**kept)
        settings.seed, settings.stops = request.seed, request.stops
        settings.stop_strings = [*answers.stops, *request.stops] or None
        return settings

    def generate(
        self, inputs: Mapping[str, Any], settings: Settings, streamer: Any = None
    ) -> list[int]:
        """Return the ids of an answer to one prompt."""
        model, ids = self.answerer.model, inputs["input_ids"]
        left = self._most - ids.shape[1] + 1
        settings.max_new_tokens = min(int(settings.max_new_tokens or 0), left)
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        given: dict[str, Any] = {"generation_config": settings, "streamer": streamer}
        if settings.stop_strings:
            given["tokenizer"] = self.answerer.processor.tokenizer
        sees = "pixel_values" in inputs
        with torch.inference_mode(), self.answerer.generating({"do_sample": settings.do_sample}):
            workflow = self.workflow if sees else TEXT_WORKFLOW
            out = model.generate(**inputs, workflow=workflow, **given)
        return out[0, ids.shape[1] :].tolist()

    def text(self, ids: Sequence[int], settings: Settings) -> str:
        """Return the text of an answer, without what ended it."""
        text = self.answerer.text(ids)
        for stop in settings.stops:
            text = text.partition(stop)[0]
        return text

    def streamer(self, on_text: Callable[[str], None], settings: Settings) -> AnswerStreamer:
        """Return what hands pieces of an answer on as they come."""
        return AnswerStreamer(self.answerer, on_text, settings.stops)

    # -- as a processor -------------------------------------------------------------------------

    def __call__(self, text: str, **_: Any) -> BatchFeature:
        """Tokenise a text that goes on, as the base's tokenizer does.

        Raises:
            UsageError: It is longer than what the base was made for.
        """
        return self._checked(dict(self.answerer.processor.tokenizer(text, return_tensors="pt")))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, **_: Any
    ) -> BatchFeature:
        """Return the inputs of a conversation.

        Raises:
            UsageError: The template refuses it, an image cannot be read, or the base alone is
                asked about one.
        """
        processor = self.answerer.processor
        row = processor.encode(messages, tools=tools)
        if row.images and self.workflow == TEXT_WORKFLOW:
            raise UsageError(
                f"the model {self.name!r} is the language model alone, which sees no images; ask "
                "one of the others in /v1/models"
            )
        return self._checked(processor.inputs([row], "left"))

    def _checked(self, inputs: dict[str, Any]) -> BatchFeature:
        length = inputs["input_ids"].shape[1]
        if not length:
            raise UsageError("the prompt is empty; give a text")
        if length > self._most:
            raise UsageError(
                f"the prompt has {length} positions, an image's counted, and the base was made for "
                f"{self._most}; give a shorter one"
            )
        return BatchFeature(inputs)

    @property
    def _most(self) -> int:
        """Return the positions of a prompt and its answer, so that every answer ends."""
        anatomy = self.answerer.model.anatomy
        return anatomy.position_table or anatomy.max_positions or sys.maxsize
