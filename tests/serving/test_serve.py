"""`mmgraft serve`: OpenAI's API, held against the answers of the model itself."""

from __future__ import annotations

import base64
import http.client
import io
import json
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from openai import OpenAI
from PIL import Image

from mmgraft.errors import UsageError
from mmgraft.inference import Answerer
from mmgraft.serving.app import Allowed, build_app, serve_names
from mmgraft.serving.requests import CompletionRequest
from mmgraft.serving.served import Served
from tiny_runs import make_parts, make_run
from tiny_towers import picture

KEY = "open sesame"
SEEN = picture(16, 16)


def data_url(image: Image.Image = SEEN, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def asks(text: str, *urls: str) -> list[dict[str, Any]]:
    """OpenAI's messages."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if urls else text}]


def rows(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    """The same as mmgraft's own messages."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": text}] if images else text}
    ]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_parts(tmp_path_factory.mktemp("serve"))
    make_run(folder, folder / "first", "iaa")
    make_run(folder, folder / "second-one", "llava")
    (folder / "open").mkdir()
    SEEN.save(folder / "open" / "a.png")
    SEEN.save(folder / "closed.png")
    return folder


@pytest.fixture(scope="module")
def served(parts: Path) -> dict[str, Served]:
    return serve_names(Answerer.load(parts / "first"), [parts / "second-one"])


@pytest.fixture(scope="module")
def address(parts: Path, served: dict[str, Served]) -> Iterator[str]:
    app = build_app(served, Allowed(files=(parts / "open").resolve()), KEY)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = server.force_exit = True  # a test that failed left its connection open
    thread.join()


@pytest.fixture(scope="module")
def client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


def send(address: str, path: str, body: Any, key: str = KEY) -> tuple[int, Any]:
    """Status and JSON of a request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(address + path, data, head)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def refused(address: str, wanted: int, text: str, path: str = "/v1/chat/completions", **body: Any):
    body = {"model": "mm", "messages": asks("hi"), **body}
    status, answer = send(address, path, body)
    assert (status, set(answer)) == (wanted, {"error"}), answer
    assert text in answer["error"]["message"]
    assert "Traceback" not in answer["error"]["message"]


def alone(served: dict[str, Served], name: str, messages: list[dict[str, Any]], **more: Any) -> str:
    one = served[name]
    settings = {"max_new_tokens": 6, "do_sample": False, **more}
    sees = any(isinstance(turn["content"], list) for turn in messages)
    return one.answerer.answers([messages], one.workflow if sees else "text", **settings)[0]


def test_a_graft_is_called_as_its_folder_whatever_that_is(parts: Path, tmp_path: Path) -> None:
    names = ["text", "1", "a-b", "a.b"]
    folders = [shutil.copytree(parts / "second-one", tmp_path / name) for name in names]
    found = serve_names(Answerer.load(parts / "first"), folders)
    assert list(found) == ["base", "mm", *names]
    assert len({one.workflow for one in found.values()}) == 6


def test_models(client: OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["base", "mm", "second-one"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["mm", "second-one"])
def test_answers_are_the_models_own(
    client: OpenAI, served: dict[str, Served], name: str, stream: bool
) -> None:
    given = {"model": name, "temperature": 0, "max_tokens": 6, "stream": stream}

    def answer(messages: list[dict[str, Any]]) -> str:
        made = client.chat.completions.create(messages=messages, **given)  # type: ignore[call-overload]
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in made)
        assert made.choices[0].finish_reason == "length"
        assert made.usage.completion_tokens == 6
        return made.choices[0].message.content

    seen = alone(served, name, rows("which colour?", SEEN, picture(16, 16, 1)))
    shown = asks("which colour?", data_url(), data_url(picture(16, 16, 1)))
    assert answer(shown).strip() == seen
    assert answer(asks("which colour?")).strip() == alone(served, "base", rows("which colour?"))


def test_the_workflows_differ(served: dict[str, Served]) -> None:
    question = rows("which colour?", SEEN)
    assert alone(served, "mm", question) != alone(served, "second-one", question)


def test_many_clients_at_once_get_what_each_gets_alone(
    client: OpenAI, served: dict[str, Served]
) -> None:
    questions = []
    for number in range(24):
        name, image = ("base", "mm", "second-one")[number % 3], picture(16, 16, number % 2)
        shown = () if name == "base" else (image,)
        messages = asks(f"what is {number}?", *map(data_url, shown))
        wanted = alone(served, name, rows(f"what is {number}?", *shown))
        questions.append((name, messages, wanted))

    def ask(question: tuple[str, Any, str]) -> tuple[str, str]:
        name, messages, wanted = question
        made = client.chat.completions.create(
            model=name, messages=messages, temperature=0, max_tokens=6
        )
        return str(made.choices[0].message.content).strip(), wanted

    with ThreadPoolExecutor(8) as pool:
        for given, wanted in pool.map(ask, questions):
            assert given == wanted


def test_stop_texts_seed_and_bias(client: OpenAI, served: dict[str, Served]) -> None:
    whole = alone(served, "mm", rows("why?", SEEN), max_new_tokens=12)
    stop = next(letter for letter in whole[1:] if letter.isascii() and letter.isalpha())
    given: dict[str, Any] = {"model": "mm", "messages": asks("why?", data_url()), "max_tokens": 12}
    cut = client.chat.completions.create(**given, temperature=0, stop=[stop])
    assert cut.choices[0].message.content == whole.partition(stop)[0]
    assert cut.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(**given, temperature=0, stop=stop, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == whole.partition(stop)[0].strip()
    sampled = [
        client.chat.completions.create(**given, temperature=5.0, top_p=0.99, seed=seed)
        .choices[0].message.content
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert sampled[0] == sampled[1] != sampled[2]
    forced = client.chat.completions.create(**given, temperature=0, logit_bias={"7": 1e4})
    tokenizer = served["mm"].answerer.processor.tokenizer
    assert forced.choices[0].message.content == tokenizer.decode([7] * 12).strip()


def test_text_that_goes_on(client: OpenAI, served: dict[str, Served]) -> None:
    model, tokenizer = served["mm"].answerer.model, served["mm"].answerer.processor.tokenizer
    ids = tokenizer("red and", return_tensors="pt")["input_ids"]
    made = client.completions.create(model="base", prompt="red and", max_tokens=5, temperature=0)
    with torch.no_grad(), model.greedy():
        out = model.base.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    wanted = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert made.choices[0].text.strip() == wanted.strip()
    assert client.completions.create(model="mm", prompt="red and", max_tokens=5, temperature=0)


@pytest.mark.parametrize(
    ("status", "text", "body"),
    [
        (404, "known: base, mm, second-one", {"model": "mn"}),
        (400, "alone, which sees no images", {"model": "base", "messages": asks("a", data_url())}),
        (400, "'model'", {"model": None}),
        (400, "'messages'", {"messages": []}),
        (400, "'messages", {"messages": "hi"}),
        (400, "role", {"messages": [{"content": "hi"}]}),
        (400, "'n'", {"n": 2}),
        (400, "'temperature'", {"temperature": -1}),
        (400, "'max_tokens'", {"max_tokens": 0}),
        (400, "'logprobs'", {"logprobs": True}),
        (400, "'frequency_penalty'", {"frequency_penalty": 0.5}),
        (400, "'response_format", {"response_format": {"type": "json_object"}}),
        (400, "unknown key 'max_new_tokens'", {"max_new_tokens": 5}),
        (400, "messages[0].content[0]", {"messages": asks("a", "https://e.org/a.png")}),
        (400, "--allow-urls", {"messages": asks("a", "https://e.org/a.png")}),
        (400, "--allow-files", {"messages": asks("a", "/etc/hostname")}),
        (400, "cannot identify image file)", {"messages": asks("a", "data:image/png;base64,AAAA")}),
        (400, "messages[0].content[0]", {"messages": [{"role": "user", "content": [{}]}]}),
        (400, "messages[0].content[0]", {"messages": [{"role": "user", "content": [7]}]}),
        (400, "messages[0]", {"messages": [{"role": "user", "content": 7}]}),
        (400, "messages[0]", {"messages": [{"role": "user", "content": {"text": "hi"}}]}),
        (400, "messages[0]", {"messages": [7]}),
        (400, "role", {"messages": [{"role": 5, "content": "hi"}]}),
        (400, "'model'", {"model": ["mm"]}),
        (400, "'temperature'", {"temperature": "warm"}),
        (400, "'temperature'", {"temperature": float("nan")}),
        (400, "'temperature'", {"temperature": float("inf")}),
        (400, "'max_tokens'", {"max_tokens": "many"}),
        (400, "'stop", {"stop": 5}),
        (400, "'stream'", {"stream": "maybe"}),
        (400, "'seed'", {"seed": 2**70}),
        (400, "'tools'", {"tools": "a hammer"}),
        (400, "'logit_bias", {"logit_bias": {"a": 1}}),
        (400, "logit_bias", {"logit_bias": {"999999": 1}}),
        (400, "logit_bias", {"logit_bias": {"-1": 1}}),
        (400, "half a character", {"messages": asks("a\ud800")}),
        (400, "half a character", {"stop": ["a\udfff"]}),
        (400, "half a character", {"user": "\ud83d"}),
        (400, "'stream'", {"stream": "no"}),
        (400, "stream_options", {"stream_options": {"include_usages": True}}),
        (400, "stream_options", {"stream_options": {"include_usage": "perhaps"}}),
        (400, "messages[0].content[0]", {"messages": asks("a", "http://[")}),
        (400, "messages[0].content[0]", {"messages": asks("a", "a\0b.png")}),
        (400, "half a character", {"messages": asks("\ud800")}),
        (400, "half a character", {"messages": asks("a", "data:image/png;base64,\ud800")}),
        (400, "half a character", {"stop": ["\ud800"]}),
    ],
)  # fmt: skip
def test_refused(address: str, status: int, text: str, body: dict[str, Any]) -> None:
    refused(address, status, text, **body)
    assert send(address, "/v1/models", b"", KEY)[0] == 405  # it lives, and asks for GET


def test_files_of_the_server(parts: Path, address: str, client: OpenAI) -> None:
    inside = (parts / "open" / "a.png").as_uri()
    given: dict[str, Any] = {"model": "mm", "temperature": 0, "max_tokens": 6}
    by_file = client.chat.completions.create(**given, messages=asks("why?", inside))
    by_bytes = client.chat.completions.create(**given, messages=asks("why?", data_url()))
    assert by_file.choices[0].message.content == by_bytes.choices[0].message.content
    for outside in ((parts / "closed.png").as_uri(), inside.replace("open/", "open/../open/../")):
        refused(address, 400, "may not open it", messages=asks("why?", outside))


def test_images_that_are_too_large(address: str) -> None:
    bomb = data_url(Image.new("1", (30_000, 30_000)))
    refused(address, 400, "too large", messages=asks("a", bomb))
    for size in (str(64 * 2**20 + 1), ""):
        asked = http.client.HTTPConnection(address.removeprefix("http://"))
        asked.putrequest("POST", "/v1/chat/completions")
        asked.putheader("Authorization", f"Bearer {KEY}")
        asked.putheader(*(("Content-Length", size) if size else ("Transfer-Encoding", "chunked")))
        asked.endheaders()
        answer = asked.getresponse()
        assert answer.status == 413
        assert b"64 MiB" in answer.read()
        asked.close()


def test_broken_bodies_keys_and_routes(address: str) -> None:
    for body in (b"{", b"[1]", b"", b"7", b"null", b"\xff", b"[" * 100_000):
        status, answer = send(address, "/v1/chat/completions", body)
        assert status == 400
        assert "no JSON object" in answer["error"]["message"]
    for key in ("", "open", KEY + "x"):
        status, answer = send(address, "/v1/chat/completions", {}, key)
        assert status == 401
        assert "Authorization" in answer["error"]["message"]
    for path in ("/reset", "/load_model", "/v1/responses", "/docs", "/v1/completions/"):
        assert send(address, path, {})[0] == 404


def test_a_page_can_read_what_is_refused(served: dict[str, Served]) -> None:
    """Else a browser says that nobody answered."""
    client = TestClient(build_app(served, key=KEY, cors=True))
    head = {"Origin": "null", "Authorization": "Bearer wrong"}
    for answer in (
        client.get("/v1/models", headers=head),
        client.post("/v1/chat/completions", headers=head, content=b"{"),
        client.get("/nowhere", headers={**head, "Authorization": f"Bearer {KEY}"}),
    ):
        assert answer.status_code in (401, 404)
        assert answer.headers["access-control-allow-origin"] in ("*", "null")
        assert answer.json()["error"]["message"]


def test_a_client_that_goes_away_ends_its_answer(client: OpenAI, served: dict[str, Served]) -> None:
    long = client.chat.completions.create(
        model="mm", messages=asks("go on", data_url()), max_tokens=60, temperature=0, stream=True,
        logit_bias={"7": 1e4},
    )  # fmt: skip
    next(iter(long))
    long.close()
    after = client.chat.completions.create(
        model="mm", messages=asks("why?", data_url()), max_tokens=6, temperature=0
    )
    assert after.choices[0].message.content == alone(served, "mm", rows("why?", SEEN))


@pytest.mark.parametrize("base", ["gpt2", "llama"])  # a table of positions, and none
def test_an_answer_ends_where_the_base_does(tmp_path: Path, base: str) -> None:
    parts = make_parts(tmp_path, base)
    made = make_run(parts, tmp_path / "run", "llava")
    served = serve_names(Answerer.load(made))["base"]
    most = served.answerer.model.anatomy.max_positions
    with pytest.raises(UsageError, match=f"the base was made for {most};"):
        served("long " * most)
    request = CompletionRequest(model="base", prompt="a", max_tokens=10**6, temperature=0)
    inputs, settings = served("a b c"), served.settings(request)
    settings.eos_token_id = None
    ids = served.generate(inputs, settings)
    assert len(ids) == most - inputs["input_ids"].shape[1] + 1


def test_ctrl_c_does_not_wait_for_long_answers(cli, parts: Path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: seen.append(self.config))
    ran = cli("serve", parts / "first", "--no-vllm", "--port", "0")
    assert ran.code == 0, ran.err
    assert 0 < seen[0].timeout_graceful_shutdown < 10


def test_command_refuses_before_it_loads(cli, parts: Path, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = cli("serve", parts / "first", "--port", str(taken.getsockname()[1]))
    assert ran.code == 2
    assert "cannot listen" in ran.err
    ran = cli("serve", parts / "first", "--allow-files", parts / "nowhere")
    assert ran.code == 2
    assert "no folder" in ran.err
    monkeypatch.setattr("mmgraft.serving.app.find_spec", lambda name: None)
    ran = cli("serve", parts / "first")
    assert ran.code == 2
    assert "pip install 'mmgraft[serve]'" in ran.err
