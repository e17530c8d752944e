"""A loopback Hub for tests that call huggingface_hub in this process, and a run folder to push.

`from hub_fixtures import hub` in a `conftest.py` gives the fixture. Processes that a test starts
get `hub.env(home)` instead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub_server import HubServer
from mmgraft.model.files.graft_file import BaseReference, GraftFile, ImageToken
from mmgraft.vision.spec import VisionSpec

RECIPE = """\
# a recipe with a comment
name: small
method: iaa
data:
  - path: rows.jsonl
stages:
  - {name: align, train: [projector], lr: 1.0e-3}
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running Hub that huggingface_hub in this process talks to, logged in as `tester`.

    Uploads go through LFS; retries wait for nothing.
    """
    with HubServer() as server:
        talk_to(server, tmp_path / "hf_home", monkeypatch)
        yield server


def talk_to(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub in this process talk to `server`, keep what it fetches in `home`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    hasty = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr(_http, "time", hasty)
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def make_record(**values: Any) -> GraftFile:
    """A graft's record; `values` replace its fields."""
    defaults: dict[str, Any] = {
        "method": "iaa",
        "config": {"method": "iaa", "layers": [1, 3], "structure": "c", "head": False},
        "base": BaseReference(id="acme/tiny-llama", revision="a" * 40, fingerprint={"tensors": {}}),
        "vision": VisionSpec(id="acme/tiny-clip", revision="b" * 40, feature_layer=-2),
        "image_token": ImageToken(id=7, why="reserved"),
    }
    return GraftFile(**{**defaults, **values})


def make_run(folder: Path, size: int = 64, **values: Any) -> Path:
    """A run folder after training: the graft, and much that must not be pushed.

    Args:
        folder: where to.
        size: side of its two square tensors; 64 makes the weights 48 KiB.
        values: fields of the record.
    """
    folder.mkdir(parents=True)
    (folder / "graft_config.json").write_text(make_record(**values).dump())
    rng = np.random.default_rng(0)
    tensors = {
        "projector.mlp.0.weight": rng.standard_normal((size, size), np.float32),
        "projector.mlp.0.bias": np.zeros(size, np.float32),
        "graft.layers.0.self_attn.q_proj.weight": rng.standard_normal((2 * size, size), np.float32),
        "graft.norm.weight": np.ones(size, np.float32),
    }
    save_file(tensors, folder / "graft.safetensors", metadata={"format": "pt"})
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "results.json").write_text(json.dumps({"accuracy": 0.8}))
    (folder / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    (folder / ".secret").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    state = folder / "checkpoints" / "checkpoint-10"
    state.mkdir(parents=True)
    for name in ("optimizer.pt", "graft.safetensors", "rng_state.pth", "tokenizer.json"):
        (state / name).write_bytes(b"state")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
