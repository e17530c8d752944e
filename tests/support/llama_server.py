"""llama.cpp's own HTTP server in this process, as the package xllamacpp brings it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import xllamacpp

from waiting import LAST


class LlamaServer:
    """A running server.

    Attributes:
        address: As in `http://127.0.0.1:41234`.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def post(self, path: str, **body: Any) -> Any:
        """The parsed answer to a request."""
        headers = {"Content-Type": "application/json"}
        request = Request(self.address + path, json.dumps(body).encode(), headers)
        with urlopen(request, timeout=LAST) as answer:
            return json.load(answer)

    def get(self, path: str) -> Any:
        """The parsed answer to a request without a body."""
        with urlopen(self.address + path, timeout=LAST) as answer:
            return json.load(answer)


@contextmanager
def llama_server(
    text: Path, mmproj: Path | None = None, context: int = 512, template: str = ""
) -> Iterator[LlamaServer]:
    """Serve a GGUF file, with an mmproj file where there are images, in fp32 as far as it goes."""
    params = xllamacpp.CommonParams()
    params.model.path = str(text)
    if mmproj is not None:
        params.mmproj.path = str(mmproj)
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel = context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.use_jinja, params.chat_template = True, template
    params.warmup, params.verbosity = False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    try:
        yield LlamaServer(server.listening_address)
    finally:
        del server  # its threads end with it
