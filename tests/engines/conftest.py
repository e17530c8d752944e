"""One server of vLLM for all tests that ask one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from taught import BOX, teach
from tiny_exports import change_record, make_base, make_graft
from vllm_engine import SIZES, image
from vllm_server import Server, running

GRAFTS: dict[str, dict[str, Any]] = {
    "words": {"layers": [1, 3]},
    "boxes": {"method": "llava"},
    "finds": {"layers": [0, 2]},
}
OPTIONS = "--dtype float32 --max-model-len 256 --block-size 32 --max-num-seqs 8"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A base and three workflows; `finds` was taught to answer about an image with a box."""
    folder = tmp_path_factory.mktemp("serve")
    make_base(folder, "qwen2", **SIZES, tie_word_embeddings=True)
    runs = {name: make_graft(folder, "qwen2", name=name, **one) for name, one in GRAFTS.items()}
    for name, run in runs.items():
        change_record(run, workflow=name)
    teach(runs["finds"], image(16, 7), "Where is it?", BOX)
    with running(runs, folder, OPTIONS, "--cors") as made:
        yield made
