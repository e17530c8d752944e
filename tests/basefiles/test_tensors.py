"""Reading single tensors, from one shard or many, and from the slow formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmgraft.anatomy import examine_config
from mmgraft.basefiles import TensorReader, fingerprint, load_config, read_layers, resolve
from mmgraft.errors import UsageError
from tiny import save_base, tiny_model


def reader_of(folder: Path) -> TensorReader:
    return TensorReader(resolve(folder))


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_every_tensor_of_every_shard_as_it_was_saved(shard: str, tmp_path: Path) -> None:
    save_base(tmp_path, "qwen3", dtype=torch.bfloat16, max_shard_size=shard)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "60KB")
    saved = {key: value for file in files for key, value in load_file(file).items()}
    with reader_of(tmp_path) as reader:
        assert reader.keys() == sorted(saved) == list(reader)
        for key, tensor in saved.items():
            assert reader.shape(key) == tuple(tensor.shape)
            assert reader.dtype(key) == tensor.dtype == torch.bfloat16
            assert torch.equal(reader.get(key), tensor)
        assert reader.main_dtype() == torch.bfloat16
        with pytest.raises(UsageError, match="no tensor 'x'"):
            reader.get("x")


def test_an_index_decides_which_files_count(tmp_path: Path) -> None:
    save_base(tmp_path, "llama", max_shard_size="60KB")
    save_file({"of.another.run": torch.zeros(1)}, tmp_path / "left-over.safetensors")
    assert "of.another.run" not in reader_of(tmp_path).keys()  # noqa: SIM118


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    save_base(tmp_path, "llama", max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    with pytest.raises(UsageError, match=rf"{shards[1].name} is not a whole safetensors file"):
        reader_of(tmp_path)
    shards[1].write_bytes(b"<html>not found</html>")
    with pytest.raises(UsageError, match=shards[1].name):
        reader_of(tmp_path)
    shards[1].unlink()
    with pytest.raises(UsageError, match=f"lacks {shards[1].name}"):
        reader_of(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UsageError, match=r"index\.json is damaged"):
        reader_of(tmp_path)


def test_weights_in_a_bin_file_are_the_same_and_flagged(tmp_path: Path) -> None:
    fast = save_base(tmp_path / "fast", "mixtral", tokenizer=False)
    slow = save_base(tmp_path / "slow", "mixtral", tokenizer=False)
    torch.save(load_file(slow / "model.safetensors"), slow / "pytorch_model.bin")
    (slow / "model.safetensors").unlink()
    with reader_of(slow) as reader, reader_of(fast) as expected:
        assert "pytorch_model.bin" in (reader.files.slow or "")
        state = tiny_model("mixtral").state_dict()
        assert reader.keys() == sorted(state)
        assert all(torch.equal(reader.get(key), state[key]) for key in reader)
        config = load_config(reader.files)
        anatomy, owns = examine_config(config), ("embedding", "norm", "head")
        ours = read_layers(reader, config, [2], owns, anatomy).state_dict()
        theirs = read_layers(expected, config, [2], owns, anatomy).state_dict()
        for path in (anatomy.embedding_path, anatomy.norm_path, anatomy.head_path):
            assert f"{path}.weight" in theirs
        assert any(key.startswith(f"{anatomy.layers_path}.2.") for key in theirs)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    prints = fingerprint(resolve(slow))
    assert prints == json.loads(json.dumps(prints))
    assert set(prints["tensors"]) == set(state)


def test_a_gguf_file_gives_its_weights(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = tiny_model("llama", num_key_value_heads=4)
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for add, value in [
        (writer.add_context_length, 128),
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 4),
        (writer.add_feed_forward_length, 48),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 4),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_rope_freq_base, 500.0),
        (writer.add_vocab_size, 320),
    ]:
        add(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    for name, tensor in model.state_dict().items():
        stem, _, end = name.rpartition(".")
        # llama.cpp keeps the rotary halves of each head interleaved.
        if stem.endswith(("q_proj", "k_proj")):
            tensor = tensor.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
        writer.add_tensor(f"{names.get_name(stem)}.{end}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = resolve(file)
    config = load_config(files)
    assert config.num_hidden_layers == 4
    with TensorReader(files) as reader:
        parts = read_layers(reader, config, [1], ("head",), examine_config(config))
    found, expected = parts.state_dict(), model.state_dict()
    assert {"lm_head.weight", "model.layers.1.mlp.up_proj.weight"} <= found.keys()
    assert all(torch.equal(value.float(), expected[key]) for key, value in found.items())
