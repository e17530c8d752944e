"""`mmgraft serve` starts vLLM: OpenAI's API, a model for the base and one for every workflow."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tiny_exports import change_record, make_base, make_graft
from vllm_engine import SIZES, Graft, Messages, image
from waiting import LAST, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")  # of vLLM itself

NEW = 6
OPTIONS = "--enforce-eager --dtype float32 --max-model-len 256 --block-size 32 --max-num-seqs 8"


class Server:
    """A running server and the grafts in it."""

    def __init__(self, port: int, runs: dict[str, Path]) -> None:
        self.address, self.runs = f"http://127.0.0.1:{port}", runs

    def send(self, path: str, body: Any = None, key: str = "open") -> tuple[int, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=LAST) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def lives(self) -> bool:
        try:
            return self.send("/health")[0] == 200
        except OSError:
            return False

    def ask(self, name: str, content: Any, **more: Any) -> tuple[int, Any]:
        body = {
            "model": name, "messages": [{"role": "user", "content": content}], "temperature": 0,
            "max_tokens": NEW, "ignore_eos": True, "return_token_ids": True, **more,
        }  # fmt: skip
        return self.send("/v1/chat/completions", body)

    def ids(self, name: str, content: Any, **more: Any) -> list[int]:
        status, answer = self.ask(name, content, **more)
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]


def url(picture: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    make_base(folder, "qwen2", **SIZES, tie_word_embeddings=True)
    configs: dict[str, Any] = {"words": {"layers": [1, 3]}, "boxes": {"method": "llava"}}
    runs = {name: make_graft(folder, "qwen2", name=name, **one) for name, one in configs.items()}
    for name, run in runs.items():
        change_record(run, workflow=name)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "mmgraft", "serve", *map(str, runs.values())]
    command += ["--port", str(port), "--vllm-options", OPTIONS]
    env = {**os.environ, "MMGRAFT_API_KEY": "open", "PYTHONPATH": os.pathsep.join(sys.path)}
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT
        )
    made = Server(port, runs)
    try:
        wait_until(lambda: process.poll() is not None or made.lives(), "vLLM's server")
        assert process.poll() is None, log.read_text()
        yield made
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def test_models_are_the_base_and_each_workflow(server: Server) -> None:
    _, listed = server.send("/v1/models")
    assert [one["id"] for one in listed["data"]] == ["qwen2", "words", "boxes"]


def test_a_model_name_is_a_workflow(server: Server) -> None:
    """All at once: the same image under two names, and text, in one batch."""
    seen = image(16, 1)
    content: Messages = [{"type": "image", "image": seen}, text("What is it?")]
    wanted = {
        name: Graft(run).answer([{"role": "user", "content": content}], NEW)[0]
        for name, run in server.runs.items()
    }
    spoken = Graft(server.runs["words"]).answer([{"role": "user", "content": "One, two?"}], NEW)[0]
    asked = [(name, [url(seen), text("What is it?")], ids) for name, ids in wanted.items()]
    asked += [(name, "One, two?", spoken) for name in ("qwen2", "words", "boxes")]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            given = list(pool.map(lambda one: server.ids(one[0], one[1]), asked))
            assert given == [ids for _, _, ids in asked]
    assert wanted["words"] != wanted["boxes"]


def test_a_workflow_can_be_asked_for_without_an_image(server: Server) -> None:
    """The same words under one name: the base's, the workflow's, and again from the cache."""
    said: Messages = [{"role": "user", "content": "One, two?"}]
    graft = Graft(server.runs["words"])
    own = graft.answer(said, NEW, workflow="words")[0]
    base = graft.answer(said, NEW)[0]
    assert own != base
    for _ in range(2):
        assert server.ids("words", "One, two?") == base
        assert server.ids("words", "One, two?", workflow="words") == own


def test_a_plain_prompt_can_ask_for_a_workflow(server: Server) -> None:
    told = {"prompt": "One, two?", "temperature": 0, "max_tokens": NEW, "ignore_eos": True}

    def answer(name: str, **more: Any) -> str:
        status, found = server.send("/v1/completions", {**told, "model": name, **more})
        assert status == 200, found
        return found["choices"][0]["text"]

    base = answer("qwen2")
    assert answer("words") == base
    assert answer("words", workflow="words") != base
    status, found = server.send(
        "/v1/completions", {**told, "model": "words", "mm_processor_kwargs": {"always": True}}
    )
    assert (status, "is not taken" in found["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("name", "asked", "told"),
    [
        ("words", "boxes", "workflow 'boxes' is not the model's name, 'words'"),
        ("words", True, "workflow True is not the model's name"),
        ("qwen2", "qwen2", "'qwen2' is no workflow, and sees no images; workflows: words, boxes"),
    ],
)
def test_a_workflow_that_cannot_be_asked_for(
    server: Server, name: str, asked: Any, told: str
) -> None:
    status, answer = server.ask(name, "One, two?", workflow=asked)
    assert status == 400
    assert told in answer["error"]["message"]


@pytest.mark.parametrize("key", ["mm_processor_kwargs", "media_io_kwargs"])
def test_a_client_cannot_choose_how_images_are_read(server: Server, key: str) -> None:
    content = [url(image(16, 2)), text("What is it?")]
    status, answer = server.ask("boxes", content, **{key: {"workflow": "words"}})
    assert status == 400
    assert f"{key} is not taken" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("name", "part", "told"),
    [
        (
            "qwen2",
            url(image(16, 3)),
            "'qwen2' is no workflow, and sees no images; workflows: words, boxes",
        ),
        ("words", {"type": "image_url", "image_url": {"url": "http://x/a.png"}}, "data URLs"),
        ("words", {"type": "image_url", "image_url": "HTTPS://x/a.png"}, "data URLs"),
        ("words", {"image_url": "ftp://x/a.png"}, "data URLs"),
        ("words", {"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "data URLs"),
        ("words", {"type": "image_url", "image_url": {"url": "file:///etc/x"}}, "data URLs"),
        ("words", {"type": "video_url", "video_url": {"url": "data:,"}}, "'video_url' is not"),
        ("words", {"type": "image_embeds", "image_embeds": "x"}, "'image_embeds' is not"),
    ],
)
def test_what_is_refused(server: Server, name: str, part: dict[str, Any], told: str) -> None:
    status, answer = server.ask(name, [part, text("What is it?")])
    assert status == 400
    assert told in answer["error"]["message"]


def test_the_server_answers_on_after_broken_requests(server: Server) -> None:
    assert server.ask("word", "hi")[0] == 404
    assert server.send("/v1/models", key="shut")[0] == 401
    assert server.send("/v1/chat/completions", b"{", key="open")[0] == 400
    assert server.send("/v1/chat/completions", [1])[0] == 400
    status, answer = server.send("/v1/messages", {"model": "words", "messages": []})
    assert (status, answer["error"]["code"]) == (404, 404)
    assert len(server.ids("qwen2", "One, two?")) == NEW
