"""A request's model name is its workflow: for ``vllm serve --middleware``.

vLLM lists all names of ``--served-model-name``, and takes a request to any of them. What it does
not do is here: tell the processor which name it was, and keep images to data URLs. A conversation
without an image is the base's, unless the request has a field ``workflow`` that names one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from PIL import Image

from mmgraft_vllm import ALWAYS, KEY

ALLOWED = "MMGRAFT_ALLOWED"
"""Schemes beside data that images may be named by, such as ``https,file``; vLLM fetches them."""

MAX_BYTES = 64 * 2**20
"""Largest body of a request."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_OURS = ("mm_processor_kwargs", "media_io_kwargs")
_ROUTES = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")


class Workflows:
    """ASGI middleware that hands the name of a request's model to the processor.

    Args:
        app: VLLM's application.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, changed or refused."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if path not in _ROUTES:
            return await _refuse(send, 404, f"{path} is not served here, but {', '.join(_ROUTES)}")
        body = await _read(receive)
        if body is None:
            return await _refuse(send, 413, f"a request has at most {MAX_BYTES // 2**20} MiB")
        try:
            body = _named(body)
        except ValueError as error:
            return await _refuse(send, 400, str(error))
        headers = [pair for pair in scope["headers"] if pair[0].lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        sent = False

        async def again() -> Any:
            nonlocal sent
            if sent:
                return await receive()  # a client that goes away
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            return await self.app({**scope, "headers": headers}, again, send)
        except Image.DecompressionBombError as error:  # which vLLM takes for a fault of its own
            return await _refuse(send, 400, str(error))


async def _read(receive: Any) -> bytes | None:
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        piece = message.get("body", b"")
        size += len(piece)
        if size > MAX_BYTES:
            return None
        pieces.append(piece)
        more = message.get("more_body", False)
    return b"".join(pieces)


def _named(body: bytes) -> bytes:
    """Put the model's name where the processor sees it; refuse what clients may not send."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON ({str(error).partition(':')[0]})") from None
    name = request.get("model") if isinstance(request, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError("the body is an object with 'model', one of the names in /v1/models")
    _check(request)
    asked = request.pop(KEY, None)
    if asked is not None and asked != name:
        raise ValueError(f"{KEY} {asked!r} is not the model's name, {name!r}; give both or neither")
    request["mm_processor_kwargs"] = {KEY: name, **({ALWAYS: True} if asked else {})}
    return json.dumps(request).encode()


def _check(request: dict[str, Any]) -> None:
    """Refuse roles that templates drop, and media that are not images in the request."""
    for key in _OURS:
        if request.get(key):
            raise ValueError(f"{key} is not taken; a workflow is chosen by the model's name")
    for message in _messages(request):
        if isinstance(message.get("role"), str) and message["role"] not in ROLES:
            raise ValueError(f"no role is called {message['role']!r}; known: {', '.join(ROLES)}")
    for kind, address in _media(request):
        if kind != "image_url":
            raise ValueError(f"content of type {kind!r} is not taken; send text and image_url")
        scheme = address.partition(":")[0].lower()
        if scheme not in ("data", *os.environ.get(ALLOWED, "").split(",")):
            raise ValueError("images come as data URLs (data:image/png;base64,...)")
        if scheme == "data" and not address.partition(",")[0].endswith(";base64"):
            raise ValueError("the data of a data URL are base64 (data:image/png;base64,...)")


def _messages(request: dict[str, Any]) -> list[dict[str, Any]]:
    messages = request.get("messages")
    return [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []


def _media(request: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the type and the address of every part that is not text."""
    for message in _messages(request):
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type", "image_url") if isinstance(part, dict) else "text"
            if kind in ("text", "refusal", "thinking"):
                continue
            address = part.get("image_url")
            address = address.get("url") if isinstance(address, dict) else address
            yield str(kind), str(address or "")


async def _refuse(send: Any, status: int, message: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
