"""Finding the files of a base: folders, GGUF files, the Hub, and everything that goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, GPT2Config

from hub_server import HubServer
from mmgraft.basefiles import TensorReader, load_config, resolve
from mmgraft.errors import MMGraftError, UsageError
from tiny import save_base, tiny_config, tiny_model

ID = "acme/tiny-llama"


def test_a_local_folder_is_known_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_base(tmp_path / "base", "llama")
    monkeypatch.chdir(tmp_path)
    files = resolve("base")
    assert files.id == str(tmp_path / "base")
    assert (files.path, files.revision, files.slow) == (tmp_path / "base", None, None)
    assert load_config(files).to_dict() == load_config(resolve(tmp_path / "base")).to_dict()


@pytest.mark.parametrize(
    ("name", "word"),
    [("./gone", "no folder"), ("a/b/c", "no folder"), ("no such model", "no folder")],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(name: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        resolve(name)
    assert "Qwen/Qwen2-7B-Instruct" in str(caught.value)


def test_a_folder_without_the_files_of_a_base_says_which_are_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json"):
        resolve(tmp_path)
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"weights \(\*\.safetensors\)"):
        resolve(tmp_path)


def test_of_several_gguf_files_one_must_be_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=r"2 GGUF files.*a\.gguf"):
        resolve(tmp_path)
    files = resolve(tmp_path / "b.gguf")
    assert (files.gguf, files.path) == ("b.gguf", tmp_path)
    assert files.slow is not None
    (tmp_path / "a.gguf").unlink()
    assert resolve(tmp_path).gguf == "b.gguf"


def test_broken_unknown_and_non_causal_configurations_are_refused(tmp_path: Path) -> None:
    files = resolve(save_base(tmp_path, "llama", tokenizer=False))
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        load_config(files)
    config.write_text(json.dumps({"model_type": "of_next_year"}))
    with pytest.raises(UsageError, match="upgrade"):
        load_config(files)
    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="not a causal language model"):
        load_config(files)
    GPT2Config(is_encoder_decoder=True).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="encoder"):
        load_config(files)


def test_an_offline_machine_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        resolve(ID)


def test_a_snapshot_holds_what_a_base_needs_and_its_commit(hub: HubServer, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", max_shard_size="100KB")
    (base / "README.md").write_text("x" * 1000)
    (base / "pytorch_model.bin").write_bytes(b"x" * 1000)
    (base / "consolidated.safetensors").write_bytes(b"x" * 1000)
    (base / "original").mkdir()
    shutil.copy(base / "config.json", base / "original" / "model.safetensors")
    commit = hub.add_model(ID, base)
    files = resolve(ID)
    assert (files.id, files.revision, files.slow) == (ID, commit, None)
    left_out = {"README.md", "pytorch_model.bin", "consolidated.safetensors", "original"}
    assert {p.name for p in files.path.iterdir()} == {p.name for p in base.iterdir()} - left_out
    here = TensorReader(resolve(base))
    with TensorReader(files) as reader:
        assert reader.keys() == here.keys()
        assert all(torch.equal(reader.get(k), here.get(k)) for k in reader)
    hub.add_model(ID, save_base(tmp_path / "next", "llama", seed=1))
    assert resolve(ID).revision != commit
    assert resolve(ID, commit).revision == commit


def test_bin_weights_are_fetched_only_where_there_are_no_others(
    hub: HubServer, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "llama", tokenizer=False)
    (base / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), base / "pytorch_model.bin")
    hub.add_model(ID, base)
    files = resolve(ID)
    assert "pytorch_model.bin" in (files.slow or "")
    assert (files.path / "pytorch_model.bin").is_file()


def test_names_and_revisions_that_the_hub_does_not_have(hub: HubServer, tmp_path: Path) -> None:
    hub.add_model(ID, save_base(tmp_path / "base", "llama", tokenizer=False))
    with pytest.raises(UsageError, match=r"no model 'acme/none'.*hf auth login"):
        resolve("acme/none")
    with pytest.raises(UsageError, match="no revision 'v9'"):
        resolve(ID, "v9")


def test_a_dead_network_is_a_failure_not_a_wrong_use(hub: HubServer, tmp_path: Path) -> None:
    hub.add_model(ID, save_base(tmp_path / "base", "llama", tokenizer=False))
    hub.drop_connection_on("/")
    with pytest.raises(MMGraftError, match="network") as caught:
        resolve(ID)
    assert caught.value.exit_code == 1
    hub.restore()
    assert resolve(ID).id == ID
