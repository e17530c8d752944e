"""Check field by field that a request's settings reach the generation, without a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, image_utils

from mmgraft.errors import UsageError
from mmgraft.serving import handlers
from mmgraft.serving.requests import Allowed, ChatRequest, CompletionRequest, Sampling
from mmgraft.serving.served import Served, Settings

BASE = {"do_sample": True, "temperature": 0.5, "top_p": 0.75, "top_k": 7, "eos_token_id": 2}


def settings_of(request: Sampling, **base: Any) -> Settings:
    answers = SimpleNamespace(stops=("<end>",), with_ends=lambda own: [own, 9])
    answerer: Any = SimpleNamespace(
        model=SimpleNamespace(
            generation_config=GenerationConfig(**base), anatomy=SimpleNamespace(vocab_size=99)
        ),
        processor=SimpleNamespace(answers=answers, pad_id=4),
    )
    return Served("mm", answerer, "mm").settings(request)


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.parse(
        {"model": "mm", "messages": [{"role": "user", "content": "hi"}], **fields}, "the request"
    )


def text(**fields: Any) -> CompletionRequest:
    return CompletionRequest.parse({"model": "mm", "prompt": "hi", **fields}, "the request")


@pytest.mark.parametrize("ask", [chat, text])
@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({}, {}),
        ({"max_tokens": 33}, {"max_new_tokens": 33}),
        ({"temperature": 1.5}, {"temperature": 1.5}),
        ({"top_p": 0.25}, {"top_p": 0.25}),
        ({"seed": 5}, {"seed": 5}),
        ({"logit_bias": {"7": -2.0}}, {"sequence_bias": {(7,): -2.0}}),
        (
            {"temperature": 1e-45},
            {"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
        ),
        ({"stop": "x"}, {"stops": ("x",), "stop_strings": ["<end>", "x"]}),
        ({"stop": ""}, {}),
        ({"stop": ["x", "", "y"]}, {"stops": ("x", "y"), "stop_strings": ["<end>", "x", "y"]}),
        (
            {"temperature": 0},
            {"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
        ),
    ],
)
def test_a_field_changes_its_setting_alone(ask, fields, changed) -> None:
    wanted = {
        **BASE, "max_new_tokens": 1024, "seed": None, "stops": (), "stop_strings": ["<end>"],
        "sequence_bias": None, "eos_token_id": [2, 9], "pad_token_id": 4, "max_length": None,
        **changed,
    }  # fmt: skip
    found = settings_of(ask(**fields), **BASE, max_length=50)
    assert {name: getattr(found, name) for name in wanted} == wanted


def test_a_base_that_does_not_sample_samples_where_it_is_asked_to() -> None:
    assert settings_of(chat(temperature=0.7)).do_sample
    assert not settings_of(chat()).do_sample


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [({"max_completion_tokens": 8}, 8), ({"max_completion_tokens": 8, "max_tokens": 9}, 8)],
)
def test_a_chat_names_its_tokens_in_two_ways(fields, tokens) -> None:
    assert settings_of(chat(**fields)).max_new_tokens == tokens


def test_nothing_goes_on_for_a_client_that_went_away() -> None:
    handed: list[int] = []
    inner: Any = SimpleNamespace(put=lambda ids: handed.append(ids.numel()), end=lambda: None)
    streamer = handlers._Cancellable(inner)
    streamer.put(torch.zeros(1, 5))  # the prompt
    streamer.put(torch.zeros(1))
    streamer.put(torch.zeros(1))
    assert (handed, streamer.total_tokens) == ([5, 1, 1], 2)
    streamer.cancel()
    with pytest.raises(handlers._Cancelled):
        streamer.put(torch.zeros(1))
    assert (handed, streamer.total_tokens) == ([5, 1, 1], 2)


def asks(url: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


@pytest.mark.parametrize("url", ["http://e.org/a.png", "HTTPS://e.org/a.png"])
def test_an_address_is_fetched_with_leave_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(
        image_utils, "load_image", lambda url, **_: fetched.append(url) or "an image"
    )
    for closed in (Allowed(), Allowed(files=Path("/"))):
        with pytest.raises(UsageError, match="--allow-urls"):
            closed.conversation(asks(url))
    assert fetched == []
    (turn,) = Allowed(urls=True).conversation(asks(url))
    assert turn == {"role": "user", "content": [{"type": "image", "image": "an image"}]}
    assert fetched == [url]


def test_a_file_is_opened_from_its_folder_alone(tmp_path: Path) -> None:
    folder = (tmp_path / "open").resolve()
    folder.mkdir()
    inside, outside = folder / "a.png", tmp_path / "open-not" / "a.png"
    allowed = Allowed(urls=True, files=folder)
    (turn,) = allowed.conversation(asks(f"file://{inside}"))
    assert turn["content"] == [{"type": "image", "image": str(inside)}]
    for url in (
        str(inside),
        f"file://{outside}",
        f"file://{folder}/../open-not/a.png",
        "ftp://e/a",
    ):
        with pytest.raises(UsageError, match="--allow-files"):
            allowed.conversation(asks(url))
    with pytest.raises(UsageError, match="--allow-files"):
        Allowed(urls=True).conversation(asks(f"file://{inside}"))
