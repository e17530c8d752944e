"""Tokens a second of a served graft: vLLM with the plugin, this process, and batches of `generate`.

    python benchmarks/serving.py RUN [--clients 1 4 16] [--tokens 48] [--rounds 3]

Starts `mmgraft serve RUN` twice, with vLLM and with `--no-vllm`, and asks each as many requests at
once as there are clients, each the next when it has its answer; `generate` answers a batch of the
same size. The three take turns, round by round, on the same questions: every second one about an
image, and no two alike, so that no prefix is shared but the template's. Every answer has the same
number of tokens. A line gives medians over the rounds, and the ratio to `generate` inside a round.
Needs vLLM and the plugin; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmgraft.inference import Answerer

EACH = 2
"""Requests of a client in a round."""

WAYS = ("vLLM", "this process")


def main() -> int:
    """Measure and print a table."""
    given = _options()
    answerer = Answerer.load(given.run, dtype=given.dtype)
    vllm = f"--enforce-eager --max-model-len {given.length} --max-num-seqs {max(given.clients)}"
    with (
        _server(given, f"--vllm-options={vllm}") as first,
        _server(given, "--no-vllm") as second,
    ):
        ways: dict[str, Callable[[list[Any]], None]] = {
            WAYS[0]: lambda rows: _ask(first, rows, given, answerer, {"ignore_eos": True}),
            WAYS[1]: lambda rows: _ask(second, rows, given, answerer, _bias(answerer)),
            "generate": lambda rows: _generate(answerer, rows, given),
        }
        print(
            "| clients | "
            + " | ".join(ways)
            + " | "
            + " | ".join(f"{w}, ratio" for w in WAYS)
            + " |"
        )
        print("|---|" + "---|" * 5, flush=True)
        for clients in given.clients:
            print(_line(clients, ways, given), flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a graft that vLLM takes")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default=None)
    parser.add_argument(
        "--length", type=int, default=512, help="positions that vLLM makes room for"
    )
    return parser.parse_args()


def _line(clients: int, ways: dict[str, Callable[[list[Any]], None]], given: Any) -> str:
    """Tokens a second of each, and ratios; the first round warms and is not counted."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds + 1):
        rows = [_question(1000 * number + at) for at in range(EACH * clients)]
        names = list(ways) if number % 2 else list(ways)[::-1]
        for name in names:
            start = time.perf_counter()
            ways[name](rows)
            found[name].append(given.tokens * len(rows) / (time.perf_counter() - start))
    kept = {name: values[1:] for name, values in found.items()}
    rates = [f"{statistics.median(values):.1f}" for values in kept.values()]
    ratios = [
        statistics.median(a / b for a, b in zip(kept[name], kept["generate"], strict=True))
        for name in WAYS
    ]
    return f"| {clients} | {' | '.join(rates)} | {' | '.join(f'{one:.2f}' for one in ratios)} |"


def _question(number: int) -> list[dict[str, Any]]:
    """A question of its own, every second one about an image."""
    text = {"type": "text", "text": f"Story {number}: tell me at length what happens in it."}
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    shown = [{"type": "image", "image": Image.fromarray(pixels)}] if number % 2 else []
    return [{"role": "user", "content": [*shown, text]}]


def _bias(answerer: Answerer) -> dict[str, Any]:
    """Forbid what would end an answer, in a field that transformers' server has too."""
    ends = answerer.processor.answers.with_ends(answerer.model.generation_config.eos_token_id)
    listed = [ends] if isinstance(ends, int) else ends or []
    return {"logit_bias": dict.fromkeys(map(str, listed), -100)}


def _ask(
    address: str, rows: list[Any], given: Any, answerer: Answerer, more: dict[str, Any]
) -> None:
    workflow = answerer.model.default_workflow

    def ask(messages: list[dict[str, Any]]) -> None:
        content = [_part(part) for part in messages[0]["content"]]
        body = {
            "model": workflow, "messages": [{"role": "user", "content": content}],
            "temperature": 0, "max_tokens": given.tokens, **more,
        }  # fmt: skip
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), head
        )
        with urllib.request.urlopen(request) as answer:
            told = json.load(answer)["usage"]["completion_tokens"]
        if told != given.tokens:
            raise SystemExit(f"an answer has {told} tokens, not {given.tokens}")

    with ThreadPoolExecutor(len(rows) // EACH) as pool:
        list(pool.map(ask, rows))


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    file = io.BytesIO()
    part["image"].save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _generate(answerer: Answerer, rows: list[Any], given: Any) -> None:
    """Answer in batches of the number of clients; rows without an image are the base's in them."""
    size = len(rows) // EACH
    for at in range(0, len(rows), size):
        answerer.answers(
            rows[at : at + size], max_new_tokens=given.tokens, min_new_tokens=given.tokens,
            do_sample=False,
        )  # fmt: skip


@contextmanager
def _server(given: Any, *options: str) -> Iterator[str]:
    """Serve the graft on a free port until the end."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    run = str(given.run.resolve())
    command = [sys.executable, "-m", "mmgraft", "serve", run, "--port", str(port)]
    command += [*options, *(["--dtype", given.dtype] if given.dtype else [])]
    env = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads()), **env}
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
        try:
            while not _lives(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(log.read())
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def _lives(address: str) -> bool:
    try:
        with urllib.request.urlopen(address) as answer:
            return answer.status == 200
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
