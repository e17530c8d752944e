"""Parts of transformers' server with mmgraft's models in them. Needs ``mmgraft[serve]``."""

import asyncio
import json
import threading
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import (
    BaseHandler,
    GenerateManager,
    GenerationState,
    Modality,
    _StreamError,
)

from mmgraft.errors import UsageError, did_you_mean
from mmgraft.inference import AnswerStreamer
from mmgraft.serving.requests import Allowed, ChatRequest, CompletionRequest, Sampling
from mmgraft.serving.served import Served, Settings


class Models(ModelManager):
    """The models that are there; none is loaded or dropped on request."""

    def __init__(self, served: Mapping[str, Served]) -> None:
        super().__init__(device="cpu", model_timeout=-1)
        self.served = served

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> Any:
        """Return a model, which is its own processor."""
        found = self.served.get(model_id_and_revision)
        if found is None:
            hint = did_you_mean(model_id_and_revision, self.served)
            raise HTTPException(404, f"no model is called {model_id_and_revision!r}; {hint}")
        return found, found

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        return Modality.VLM

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """List the models."""
        entry = {"object": "model", "created": 0, "owned_by": "mmgraft"}
        return [{"id": name, **entry} for name in self.served]


class OneQueue(GenerationState):
    """One thread that generates, since all names are served by one model."""

    def __init__(self) -> None:
        super().__init__()
        self._one = Answers()

    def get_manager(self, model_id: str, use_cb: bool = False) -> "Answers":
        return self._one


class Answers(GenerateManager):
    """Generates answers one after another, and shows them as ``mmgraft chat`` does."""

    def generate_streaming(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: Served, processor: Any, inputs: Any, gen_config: Settings, **_: Any
    ) -> "tuple[asyncio.Queue[Any], _Cancellable]":
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def send(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        streamer = _Cancellable(model.streamer(send, gen_config))

        def run() -> None:
            try:
                model.generate(inputs, gen_config, streamer)
            except _Cancelled:
                pass
            except Exception as error:
                send(_StreamError(json.dumps(str(error))[1:-1]))  # it is put between quotes
            send(None)

        self.submit(run)
        return queue, streamer

    async def generate_non_streaming(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: Served, processor: Any, inputs: Any, gen_config: Settings, **_: Any
    ) -> tuple[str, int, list[int]]:
        ids = await self.async_submit(model.generate, inputs, gen_config)
        return model.text(ids, gen_config), inputs["input_ids"].shape[-1], ids


class _Cancelled(Exception):
    """The client went away."""


class _Cancellable:
    """A streamer that counts tokens and ends the generation when its client goes away."""

    def __init__(self, streamer: AnswerStreamer) -> None:
        self._streamer, self._gone = streamer, threading.Event()
        self._prompt = True
        self.total_tokens = 0

    def put(self, value: Any) -> None:
        if self._gone.is_set():
            raise _Cancelled
        self.total_tokens += 0 if self._prompt else value.numel()
        self._prompt = False
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()

    def cancel(self) -> None:
        self._gone.set()


class _Handler(BaseHandler):
    """Checks a request by mmgraft's own rules, and generates with a model's own settings."""

    _request: type[Sampling]

    def _validate_request(self, body: dict[str, Any]) -> None:
        self._request.parse(body, "the request")
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UsageError("the request: a text has half a surrogate pair; mend it") from error

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Settings:
        served: Any = self.model_manager.load_model_and_processor(body["model"])[0]
        return served.settings(self._request.parse(body, "the request"))


class Completion(_Handler, CompletionHandler):
    """Answers ``/v1/completions``."""

    _request = CompletionRequest


class Chat(_Handler, ChatCompletionHandler):
    """Answers ``/v1/chat/completions``."""

    _request = ChatRequest

    def __init__(self, models: Models, queue: OneQueue, allowed: Allowed) -> None:
        super().__init__(models, queue)
        self.allowed = allowed

    def get_processor_inputs_from_messages(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, messages: list[dict[str, Any]], modality: Modality
    ) -> list[dict[str, Any]]:
        return self.allowed.conversation(messages)
