"""`mmgraft serve` with vLLM in a process of its own, and what a client asks it."""

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from waiting import LAST, wait_until

NEW = 6
"""Tokens of an answer."""


class Server:
    """A running server and the grafts in it, by workflow."""

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


@contextmanager
def running(runs: dict[str, Path], folder: Path, options: str, *more: str) -> Iterator[Server]:
    """Serve grafts until the end, with further options of vLLM and of `mmgraft serve`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "mmgraft", "serve", *map(str, runs.values()), *more]
    command += ["--port", str(port), "--vllm-options", f"--enforce-eager {options}"]
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
