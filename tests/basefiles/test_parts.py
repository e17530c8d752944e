"""Chosen layers of a base equal the loaded base's, and nothing else of it is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.utils import logging

from mmgraft.anatomy import decoder_layers, examine, examine_config, get_path
from mmgraft.basefiles import TensorReader, load_config, read_layers, read_modules, resolve
from mmgraft.errors import UsageError
from tiny import ARCHITECTURES, VARIANTS, save_base

EVERY = [*ARCHITECTURES, *VARIANTS]


class Watched:
    """A tensor that notes its name when it is read."""

    def __init__(self, lazy: Any, key: str, read: set[str]) -> None:
        self.lazy, self.key, self.read = lazy, key, read

    def __getitem__(self, index: Any) -> torch.Tensor:
        self.read.add(self.key)
        return self.lazy[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lazy, name)


class WatchedReader(TensorReader):
    def __init__(self, folder: Path) -> None:
        super().__init__(resolve(folder))
        self.read: set[str] = set()

    def lazy(self, key: str) -> Any:
        return Watched(super().lazy(key), key, self.read)


def same(ours: nn.Module, theirs: nn.Module) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == other[key].dtype
        assert torch.equal(tensor, other[key]), key


def parts_of(reader: TensorReader, config: Any, layers: list[int], *owns: str) -> Any:
    """Read chosen parts; by name, None for those that are not wanted."""
    anatomy = examine_config(config)
    model = read_layers(reader, config, layers, owns, anatomy)
    found = decoder_layers(model, anatomy)._modules
    paths = {name: getattr(anatomy, f"{name}_path") for name in ("embedding", "norm", "head")}
    return SimpleNamespace(
        layers=[found[str(index)] for index in layers],
        **{n: get_path(model, p) if p and n in owns else None for n, p in paths.items()},
    )


def read(folder: Path, layers: list[int], *owns: str) -> Any:
    with TensorReader(resolve(folder)) as reader:
        return parts_of(reader, load_config(reader.files), layers, *owns)


@pytest.mark.parametrize("name", EVERY)
def test_parts_equal_the_loaded_bases_to_the_bit(name: str, tmp_path: Path) -> None:
    save_base(tmp_path, name, dtype=torch.bfloat16, tokenizer=False, max_shard_size="100KB")
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    anatomy = examine(base)
    reader = WatchedReader(tmp_path)
    parts = parts_of(reader, base.config, [3, 1], "embedding", "norm", "head")
    layers = decoder_layers(base, anatomy)
    for ours, index in zip(parts.layers, [3, 1], strict=True):
        same(ours, layers[index])
        assert repr(ours) == repr(layers[index])
        assert not ours.training
    same(parts.embedding, get_path(base, anatomy.embedding_path))
    same(parts.head, get_path(base, anatomy.head_path))
    assert (parts.norm is None) == (anatomy.norm_path is None)
    if parts.norm is not None:
        same(parts.norm, get_path(base, anatomy.norm_path))
    assert (parts.head.weight is parts.embedding.weight) == anatomy.tied
    found = [re.search(r"(?:layers|h)\.(\d+)\.", key) for key in reader.read]
    assert {match[1] for match in found if match} == {"1", "3"}


@pytest.mark.parametrize("name", ["gemma3", "smollm3_sliding", "qwen3_moe_mixed", "gpt_oss"])
def test_a_layer_read_alone_computes_what_it_computes_in_the_base(
    name: str, tmp_path: Path
) -> None:
    """The window, the rotary switch and the kind of feed-forward depend on the layer's number."""
    save_base(tmp_path, name, tokenizer=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    layers = decoder_layers(base, examine(base))
    ids = torch.randint(6, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = base(ids).logits
        for index, ours in enumerate(read(tmp_path, [0, 1, 2, 3]).layers):
            layers[index] = ours
        assert torch.equal(base(ids).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_only_what_is_asked_for_is_read(name: str, tmp_path: Path) -> None:
    save_base(tmp_path, name, tokenizer=False)
    tied = name == "gemma2"

    def reads(*owns: str) -> set[str]:
        reader = WatchedReader(tmp_path)
        parts_of(reader, load_config(reader.files), [2], *owns)
        return {key for key in reader.read if ".layers.2." not in key}

    embedding = "model.embed_tokens.weight"
    assert reads() == set()
    assert reads("norm") == {"model.norm.weight"}
    assert reads("embedding") == {embedding}
    assert reads("head") == {embedding if tied else "lm_head.weight"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gpt_oss", "mixtral", "qwen2_moe"])
def test_linear_layers_are_read_without_the_rest_of_their_layer(name: str, tmp_path: Path) -> None:
    save_base(tmp_path, name, dtype=torch.bfloat16, tokenizer=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    anatomy = examine(base)
    paths = [f"{anatomy.layers_path}.{i}.{linear}" for i in (3, 1) for linear in anatomy.linears[i]]
    reader = WatchedReader(tmp_path)
    model = read_modules(reader, load_config(reader.files), paths)
    for path in paths:
        same(get_path(model, path), get_path(base, path))
    owners = {key.rpartition(".")[0].removeprefix("transformer.") for key in reader.read}
    wanted = {path.removeprefix("transformer.") for path in paths}
    assert wanted <= owners
    around = owners - wanted  # gpt-oss's attention has sinks of its own
    assert all(any(path.startswith(f"{one}.") for path in wanted) for one in around)
    assert not any("expert" in one and "shared" not in one for one in owners)


def test_the_dtype_is_the_bases_own_unless_given(tmp_path: Path) -> None:
    save_base(tmp_path, "llama", dtype=torch.bfloat16, tokenizer=False)
    for wanted, expected in [(None, torch.bfloat16), (torch.float32, torch.float32)]:
        with TensorReader(resolve(tmp_path)) as reader:
            paths = ["model.layers.0", "lm_head"]
            model = read_modules(reader, load_config(reader.files), paths, wanted)
        assert {p.dtype for p in model.parameters()} == {expected}
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"dtype": "bfloat16",', ""))
    assert read(tmp_path, [0]).layers[0].input_layernorm.weight.dtype == torch.bfloat16


def test_a_checkpoint_of_the_bare_model_is_read_too(tmp_path: Path) -> None:
    """GPT-2 on the Hub was saved without the head: its names lack the prefix."""
    save_base(tmp_path, "gpt2", tokenizer=False)
    expected = read(tmp_path, [1], "embedding", "head")
    file = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v.clone() for k, v in load_file(file).items()}
    assert "h.1.attn.c_attn.weight" in tensors
    save_file(tensors, file, metadata={"format": "pt"})
    parts = read(tmp_path, [1], "embedding", "head")
    same(parts.layers[0], expected.layers[0])
    same(parts.head, expected.head)


def test_missing_and_misshapen_tensors_are_refused(tmp_path: Path) -> None:
    save_base(tmp_path, "llama", tokenizer=False)
    file = tmp_path / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    key = "model.layers.2.mlp.up_proj.weight"
    save_file({**tensors, key: tensors[key][:40].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"config\.json says"):
        read(tmp_path, [2])
    tensors.pop(key)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=key):
        read(tmp_path, [2])
    assert len(read(tmp_path, [0, 1, 3]).layers) == 3


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    save_base(tmp_path, "llama", tokenizer=False)
    with TensorReader(resolve(tmp_path)) as reader:
        config = load_config(reader.files)
        config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        with pytest.raises(UsageError, match="quantised \\(bitsandbytes\\)"):
            read_modules(reader, config, ["model.layers.0"])


def pack_mxfp4(folder: Path) -> None:
    """Turns the experts of a saved gpt-oss into random MXFP4, as the published ones are."""
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    for key in [k for k in tensors if k.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, out = tensors.pop(key).shape
        size = (experts, out, width // 32)
        for end, shape, low, high in [("blocks", (*size, 16), 0, 256), ("scales", size, 120, 127)]:
            made = torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)
            tensors[f"{key}_{end}"] = made
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))


def test_the_mxfp4_experts_of_gpt_oss_are_unpacked(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    save_base(tmp_path, "gpt_oss", dtype=torch.bfloat16, tokenizer=False, **sizes)
    pack_mxfp4(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True)
    )
    reader = WatchedReader(tmp_path)
    parts = parts_of(reader, load_config(reader.files), [2], "head")
    same(parts.layers[0], base.model.layers[2])
    assert parts.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert not [key for key in reader.read if "layers" in key and ".layers.2." not in key]


def test_reading_says_nothing_and_leaves_logging_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_base(tmp_path, "llama", tokenizer=False)
    capfd.readouterr()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    read(tmp_path, [1])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
