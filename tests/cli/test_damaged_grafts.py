"""A graft that is damaged, or written by a newer mmgraft: told, and left as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refusals import change, on_the_hub

pytestmark = pytest.mark.xdist_group("bad-input")  # one worker makes the parts


def no_object(run: Path) -> str:
    (run / "graft_config.json").write_text("[]")
    return "corrupt"


def half_config(run: Path) -> str:
    text = (run / "graft_config.json").read_text()
    (run / "graft_config.json").write_text(text[: len(text) // 2])
    return "corrupt"


def empty_config(run: Path) -> str:
    (run / "graft_config.json").write_text("")
    return "corrupt"


def newer(run: Path) -> str:
    change(run, schema_version=99)
    return "pip install -U mmgraft"


def strange_key(run: Path) -> str:
    change(run, colour="blue")
    return "colour"


def strange_setting(run: Path) -> str:
    record = json.loads((run / "graft_config.json").read_text())
    change(run, config={**record["config"], "colour": "blue"})
    return "colour"


def strange_method(run: Path) -> str:
    change(run, method="winks")
    return "winks"


def half_weights(run: Path) -> str:
    data = (run / "graft.safetensors").read_bytes()
    (run / "graft.safetensors").write_bytes(data[: len(data) // 2])
    return "graft.safetensors"


def no_weights(run: Path) -> str:
    (run / "graft.safetensors").unlink()
    return "graft.safetensors"


def a_tensor_less(run: Path) -> str:
    tensors = load_file(run / "graft.safetensors")
    del tensors["projector.mlp.2.bias"]
    save_file(tensors, run / "graft.safetensors")
    return "projector.mlp.2.bias"


def a_tensor_more(run: Path) -> str:
    tensors = load_file(run / "graft.safetensors")
    save_file({**tensors, "colour": torch.zeros(2)}, run / "graft.safetensors")
    return "colour"


CONFIGS = [no_object, half_config, empty_config, newer, strange_key]
WEIGHTS = [half_weights, no_weights, a_tensor_less, a_tensor_more]


@pytest.mark.parametrize("damage", [*CONFIGS, strange_setting, strange_method, *WEIGHTS])
def test_a_damaged_graft_is_not_loaded(refused, run, damage) -> None:
    says = damage(run)
    assert says in refused("chat", run, "hello")
    assert says in refused("train", run)


@pytest.mark.parametrize("damage", [*CONFIGS, half_weights, no_weights])
@pytest.mark.parametrize("command", ["inspect", "push", "export"])
def test_nor_shown_or_shared(refused, run, damage, command) -> None:
    on_the_hub(run)
    says = damage(run)
    more = {"push": ["--dry-run"], "export": ["--to", "graft"]}
    assert says in refused(command, run, *more.get(command, []))
