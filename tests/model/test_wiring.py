"""Check that requests for loading, grafting and saving are handed on to what does them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grafting import CONFIGS, batch, distance, graft_on, logits_of, perturb, rows
from mmgraft import GraftedModel, basefiles
from mmgraft.basefiles import resolve
from mmgraft.model import modeling
from mmgraft.model.files import create, load
from mmgraft.model.files.load import base_files, load_base
from tiny import save_base


class Stop(BaseException):
    """Ends a call where it would begin to work."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Put a recorder in a function's place; without `gives` it ends the call."""

    def record(owner: Any, name: str, gives: Any = Stop) -> list[dict[str, Any]]:
        real, calls = getattr(owner, name), list[dict[str, Any]]()

        def instead(*args: Any, **kwargs: Any) -> Any:
            calls.append(dict(inspect.signature(real).bind(*args, **kwargs).arguments))
            if gives is Stop:
                raise Stop
            return gives

        monkeypatch.setattr(owner, name, instead)
        return calls

    return record


def asked(monkeypatch: pytest.MonkeyPatch, *args: Any) -> dict[str, Any]:
    """Return what transformers is asked for when a base is loaded."""
    seen: dict[str, Any] = {}

    def instead(path: Path, **options: Any) -> Any:
        seen.update(options, path=path)
        raise Stop

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", instead)
    files: Any = SimpleNamespace(path=Path("base"), gguf="a.gguf", id="x/y")
    with pytest.raises(Stop):
        load_base(files, *args)
    return seen


def test_transformers_is_asked_for_what_was_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(monkeypatch, "float16", {"": "cpu"}, None, "eager")
    assert found == {
        "path": Path("base"), "dtype": torch.float16, "device_map": {"": "cpu"},
        "attn_implementation": "eager", "gguf_file": "a.gguf",
        "trust_remote_code": False, "output_loading_info": True,
    }  # fmt: skip
    assert asked(monkeypatch)["dtype"] == "auto"


@pytest.mark.parametrize(
    ("dtype", "computes"), [("float16", torch.float16), (None, torch.bfloat16)]
)
def test_a_base_in_4_bit_computes_in_what_was_wanted(
    monkeypatch: pytest.MonkeyPatch, dtype: str | None, computes: torch.dtype
) -> None:
    found = asked(monkeypatch, dtype, None, "nf4", None, torch.bfloat16)["quantization_config"]
    assert found.load_in_4bit
    assert found.bnb_4bit_compute_dtype == computes
    assert found.bnb_4bit_quant_storage == torch.bfloat16


def test_a_base_is_loaded_frozen(tmp_path: Path) -> None:
    base = load_base(resolve(save_base(tmp_path / "base", "llama", tokenizer=False)))
    assert list(base.parameters())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not any(module.training for module in base.modules())


def test_where_a_base_lies(called) -> None:
    found = called(basefiles, "resolve", "files")
    record: Any = SimpleNamespace(base=SimpleNamespace(id="x/y", revision="v1"))
    assert base_files(record, Path("run")) == "files"
    base_files(record, Path("run"), "elsewhere")
    record.base.id = "./base"
    base_files(record, Path("run"))
    assert [list(call.values()) for call in found] == [
        ["x/y", "v1"], ["elsewhere"], [str(Path("run/base"))],
    ]  # fmt: skip


def test_from_pretrained_hands_on_what_it_is_given(called) -> None:
    folder = called(load, "graft_folder", Path("run"))
    record = SimpleNamespace()
    called(modeling.GraftFile, "read", record)
    files = called(load, "base_files", "files")
    checked = called(load, "check_base", None)
    loaded = called(load, "load_base")
    with pytest.raises(Stop):
        GraftedModel.from_pretrained(
            "me/run", dtype="float16", device_map={"": 0}, quantization="nf4",
            quantization_storage=torch.bfloat16, attn_implementation="eager", verify="full",
            base="elsewhere", revision="v1",
        )  # fmt: skip
    assert list(folder[0].values()) == ["me/run", "v1"]
    assert files[0]["override"] == "elsewhere"
    assert checked[0]["verify"] == "full"
    assert list(loaded[0].values()) == [
        "files", "float16", {"": 0}, "nf4", "eager", torch.bfloat16,
    ]  # fmt: skip


def test_a_workflow_is_added_and_saved_as_asked(called) -> None:
    model = graft_on("llama", CONFIGS["iaa-a"])
    saved = called(modeling, "save_graft", None)
    model.save_pretrained("there", "mm", max_shard_size="1KB")
    assert list(saved[0].values())[1:] == ["there", "mm", "1KB"]
    folder = called(load, "graft_folder")
    with pytest.raises(Stop):
        model.add_workflow("see", "me/run", revision="v1")
    assert list(folder[0].values()) == ["me/run", "v1"]


def test_a_graft_is_made_of_the_revision_that_is_named(
    called, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create, "_pinned", lambda spec: spec)
    monkeypatch.setattr(create, "describe_tower", lambda spec: None)
    seen: list[Any] = []

    def resolve(*given: Any) -> Any:
        seen.append(given)
        raise Stop

    monkeypatch.setattr("mmgraft.basefiles.resolve", resolve)
    with pytest.raises(Stop):
        create.create_graft("x/y", "a/tower", CONFIGS["iaa-a"], "there", revision="v1")
    assert seen == [("x/y", "v1")]


@pytest.mark.parametrize("method", ["iaa-a", "iaa-c", "wings"])
def test_a_graft_out_of_the_path_changes_nothing(method: str) -> None:
    """Whatever is in it; its projector alone is used, and in the path it is seen at once."""
    model = perturb(graft_on("llama", CONFIGS[method]))
    inputs, graft = batch(rows("ttiiiitt")), model.workflow().graft
    graft.set_state({**graft.state(), "active": False})
    before = logits_of(model, inputs)
    for parameter in graft.parameters():
        parameter.data.mul_(1.5)
    assert torch.equal(logits_of(model, inputs), before)
    graft.set_state({**graft.state(), "active": True})
    assert distance(logits_of(model, inputs), before) > 1e-3
