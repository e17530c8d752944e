"""Many clients at once, and some that do harm: every answer is what it is alone."""

from __future__ import annotations

import base64
import http.client
import json
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vllm_engine import Graft, image
from vllm_server import NEW, Server, text, url
from waiting import LAST

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")  # of vLLM itself

CLIENTS, REQUESTS = 32, 500
APART = 1e-3
"""Least distance of the likeliest two tokens at each step: batches round otherwise than one row."""


@dataclass(frozen=True)
class Question:
    """A conversation for one model, and the ids of its answer."""

    model: str
    content: Any
    ids: list[int]


def questions(server: Server) -> list[Question]:
    """Six for every workflow and six for the base, as mmgraft itself answers them alone."""
    found = []
    for name, run in server.runs.items():
        found += _of(
            Graft(run), name, lambda at: [image(16, 100 + at), image(16, 200 + at)][: 1 + at % 2]
        )
    return [*found, *_of(Graft(server.runs["words"]), "qwen2", lambda at: [])]


def _of(graft: Graft, model: str, seen: Any) -> list[Question]:
    found, at = list[Question](), 0
    while len(found) < 6:
        at += 1
        images, asked = seen(at), f"What is number {at}, and is it {'blue ' * (at % 5)}or red?"
        shown = [{"type": "image", "image": one} for one in images]
        content: Any = [*shown, text(asked)] if shown else asked
        ids, apart = answer(graft, content)
        if apart >= APART:
            found.append(Question(model, [*map(url, images), text(asked)] if shown else asked, ids))
    return found


@torch.no_grad()
def answer(graft: Graft, content: Any) -> tuple[list[int], float]:
    """Its greedy ids, and how far apart the likeliest two tokens are where they are closest."""
    made = graft.model.generate(
        **graft.processor([[{"role": "user", "content": content}]]), max_new_tokens=NEW,
        min_new_tokens=NEW, do_sample=False, eos_token_id=None, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    best = torch.cat(made.logits).log_softmax(-1).topk(2).values
    return made.sequences[0, -NEW:].tolist(), float((best[:, 0] - best[:, 1]).min())


def bomb(side: int = 50_000) -> dict[str, Any]:
    """A PNG of some bytes that claims to be an image of many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    made = (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(b"\0" * 999))
        + chunk(b"IEND", b"")
    )
    data = base64.b64encode(made).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


BROKEN: dict[str, Any] = {
    "no JSON": b"{",
    "no UTF-8": b'{"model": "\xff"}',
    "deeply nested": b"[" * 100_000,
    "a list": [1],
    "no model": {"model": None},
    "an empty model": {"model": ""},
    "a role that no template knows": {"messages": [{"role": "robot", "content": "hi"}]},
    "data that are not base64": {"messages": [{"role": "user", "content": [{
        "type": "image_url", "image_url": {"url": "data:image/png,hello"}}]}]},
    "no messages": {"model": "words"},
    "messages of another type": {"model": "words", "messages": "hi"},
    "a temperature of another type": {"temperature": "warm"},
    "tokens below one": {"max_tokens": -1},
    "an unknown role": {"messages": [{"role": 5, "content": "hi"}]},
    "a part of another type": {"messages": [{"role": "user", "content": [7]}]},
    "a bomb": {"messages": [{"role": "user", "content": [bomb(), text("What is it?")]}]},
    "a smaller bomb": {"messages": [{"role": "user", "content": [bomb(14_000), text("What?")]}]},
    "no image": {"messages": [{"role": "user", "content": [{
        "type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]},
    "an unknown model": {"model": "word"},
}  # fmt: skip


def refused(server: Server, what: str) -> None:
    """A request that can only be refused, in OpenAI's form."""
    body = BROKEN[what]
    if isinstance(body, dict):
        body = {"model": "words", "messages": [{"role": "user", "content": "hi"}], **body}
    if what == "no messages":
        del body["messages"]
    status, told = server.send("/v1/chat/completions", body)
    wanted = {"an unknown model": 404}.get(what, 400)
    assert status == wanted, (what, status, told)
    assert "bomb" not in what or "exceeds limit" in told["error"]["message"]
    assert isinstance(told["error"]["message"], str), told
    assert told["error"]["message"], what
    assert "Traceback" not in told["error"]["message"]


def leaves(server: Server, question: Question) -> None:
    """Ask for a long answer as it comes, and go away at its first piece."""
    body = {
        "model": question.model, "messages": [{"role": "user", "content": question.content}],
        "stream": True, "max_tokens": 60, "ignore_eos": True,
    }  # fmt: skip
    asked = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=LAST)
    head = {"Content-Type": "application/json", "Authorization": "Bearer open"}
    asked.request("POST", "/v1/chat/completions", json.dumps(body), head)
    assert asked.getresponse().readline().startswith(b"data: {")
    asked.close()


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused(server: Server, what: str) -> None:
    refused(server, what)
    assert server.lives()


def test_every_client_gets_what_it_gets_alone(server: Server) -> None:
    asked = questions(server)
    draw, broken = random.Random(3), list(BROKEN)
    assert len({tuple(one.ids) for one in asked}) > len(asked) / 2, "answers all alike prove little"
    for one in asked[:: len(asked) // 4]:
        assert server.ids(one.model, one.content) == one.ids, "alone"

    def client(number: int) -> bool:
        one = asked[draw.randrange(len(asked))]
        if number % 25 == 10:
            leaves(server, one)
        if number % 20 == 5:
            refused(server, broken[number // 20 % len(broken)])
        assert server.ids(one.model, one.content) == one.ids, (number, one.model)
        return True

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert sum(pool.map(client, range(REQUESTS))) == REQUESTS
    assert server.lives()
