"""The clients of examples/serve ask a running server, and print what it answers."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from mmgraft.inference import Answerer
from mmgraft.serving.app import build_app, serve_names
from tiny_runs import make_parts, make_run
from tiny_towers import picture

CLIENTS = Path(__file__).resolve().parents[2] / "examples" / "serve"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Answerer]]:
    folder = make_parts(tmp_path_factory.mktemp("clients"))
    answerer = Answerer.load(make_run(folder, folder / "run", "iaa"))
    picture(16, 16).save(folder / "a.png")
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(build_app(serve_names(answerer), key="k"), log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", folder / "a.png", answerer
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("client", ["stream", "image", "workflows"])
def test_client(client: str, place: tuple[str, Path, Answerer], monkeypatch) -> None:
    address, image, answerer = place
    monkeypatch.setenv("MMGRAFT_API_KEY", "k")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    question = {"type": "text", "text": "why?"}
    seen = [{"type": "image", "image": str(image)}, question]
    content = "why?" if client == "stream" else seen
    asked = [{"role": "user", "content": content}]
    prompt = len(answerer.processor.encode(asked).input_ids)
    room = answerer.model.anatomy.max_positions - prompt + 1  # a served answer ends there
    wanted = answerer.answers([asked], max_new_tokens=min(256, room), do_sample=False)[0]
    given = {
        "stream": ["base", "why?"],
        "image": ["mm", str(image), "why?"],
        "workflows": [str(image), "why?"],
    }[client]
    line = [sys.executable, str(CLIENTS / f"{client}.py"), address, *given]
    ran = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert wanted.strip() in ran.stdout
    if client == "workflows":
        assert "base: refused" in ran.stdout
