"""Check what may stand in the folder of a base, and what `graft` makes of it.

Each row of a table spoils a good folder. It is refused by name, with exit code 2 and nothing
written, or read as transformers reads it; never a traceback.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mmgraft.basefiles import resolve
from refusals import GRAFT
from tiny import save_base, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.xdist_group("bad-input")  # one worker makes the parts

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
LLAVA = ["--method", "llava"]


@pytest.fixture
def base(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the good base, outside of the folder that must not change."""
    return Path(shutil.copytree(parts / "base", tmp_path_factory.mktemp("spoiled") / "base"))


def configured(base: Path, **values: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **values}))


def tensors_of(base: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(base / WEIGHTS).items()}


def saved(base: Path, tensors: dict[str, torch.Tensor], name: str = WEIGHTS) -> None:
    save_file(tensors, base / name, metadata={"format": "pt"})


def as_bin(base: Path, state: Any = None) -> Path:
    torch.save(tensors_of(base) if state is None else state, base / "pytorch_model.bin")
    (base / WEIGHTS).unlink()
    return base / "pytorch_model.bin"


def indexed(base: Path, index: Any = None, **files: str) -> None:
    tensors = tensors_of(base)
    (base / WEIGHTS).rename(base / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {**names, **files}} if index is None else index
    (base / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


# Which weights are the base's


def other_name(base: Path) -> str:
    (base / WEIGHTS).rename(base / "weights.safetensors")
    return "only weights.safetensors"


def shards_without_index(base: Path) -> str:
    indexed(base)
    (base / f"{WEIGHTS}.index.json").unlink()
    return "model.safetensors.index.json"


def variant(base: Path) -> str:
    (base / WEIGHTS).rename(base / "model.bf16.safetensors")
    return "only model.bf16.safetensors"


def in_a_subfolder(base: Path) -> str:
    (base / "original").mkdir()
    (base / WEIGHTS).rename(base / "original" / WEIGHTS)
    return "no weights"


def a_folder_of_that_name(base: Path) -> str:
    (base / WEIGHTS).unlink()
    (base / WEIGHTS).mkdir()
    return "no weights"


def a_loop(base: Path) -> str:
    (base / WEIGHTS).unlink()
    (base / WEIGHTS).symlink_to(base / WEIGHTS)
    return "no weights"


def shard_gone(base: Path) -> str:
    indexed(base, of_another="model-00002-of-00002.safetensors")
    return "lacks model-00002-of-00002.safetensors"


def key_gone(base: Path) -> str:
    tensors = tensors_of(base)
    tensors.pop(UP)
    saved(base, tensors)
    indexed(base, **{UP: "model-00001-of-00001.safetensors"})
    return UP


def no_metadata(base: Path) -> str:
    indexed(base, {"weight_map": {UP: "model-00001-of-00001.safetensors"}})
    return "metadata"


def index_of_numbers(base: Path) -> str:
    indexed(base, {"metadata": {}, "weight_map": {UP: 3}})
    return "lacks 3"


def index_a_list(base: Path) -> str:
    indexed(base, [UP])
    return "index.json is damaged"


def tensor_gone(base: Path) -> str:
    tensors = tensors_of(base)
    tensors.pop("lm_head.weight")
    saved(base, tensors)
    return "does not hold lm_head.weight"


def other_shape(base: Path) -> str:
    tensors = tensors_of(base)
    saved(base, {**tensors, UP: tensors[UP][:40].clone()})
    return "cannot be loaded"


def an_adapter(base: Path) -> str:
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "acme/tiny"}')
    return "LoRA adapter"


def only_an_adapter(base: Path) -> str:
    for name in ("config.json", WEIGHTS):
        (base / name).unlink()
    return an_adapter(base)


def weights_by_name(base: Path) -> str:
    configured(base, transformers_weights="other.safetensors")
    return "transformers_weights"


NAMES = [other_name, shards_without_index, variant, in_a_subfolder, a_folder_of_that_name, a_loop]
INDEX = [shard_gone, key_gone, no_metadata, index_of_numbers, index_a_list]
OTHERS = [tensor_gone, other_shape, an_adapter, only_an_adapter, weights_by_name]


# Damaged files


class Runs:
    """Its pickle makes a folder where it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code-was-run",)


def pointer(file: Path) -> str:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return "git lfs pull"


def bin_pointer(base: Path) -> str:
    return pointer(as_bin(base))


def safetensors_pointer(base: Path) -> str:
    return pointer(base / WEIGHTS)


def bin_cut(base: Path) -> str:
    file = as_bin(base)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return "pytorch_model.bin is not a whole file of tensors"


def bin_empty(base: Path) -> str:
    as_bin(base).write_bytes(b"")
    return "pytorch_model.bin is not a whole file of tensors"


def bin_of_a_model(base: Path) -> str:
    as_bin(base, tiny_model("llama"))
    return "Python objects"


def bin_of_code(base: Path) -> str:
    as_bin(base, {"model.norm.weight": Runs()})
    return "never run"


def bare_pickle(base: Path) -> str:
    as_bin(base).write_bytes(pickle.dumps(Runs()))
    return "pytorch_model.bin"


def bin_nested(base: Path) -> str:
    as_bin(base, {"state_dict": tensors_of(base)})
    return "no tensors by name"


def bin_a_list(base: Path) -> str:
    as_bin(base, list(tensors_of(base).values()))
    return "no tensors by name"


def safetensors_cut(base: Path) -> str:
    (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:-10])
    return "not a whole safetensors file"


def safetensors_html(base: Path) -> str:
    (base / WEIGHTS).write_text("<html>not found</html>")
    return "not a whole safetensors file"


BINS = [bin_pointer, bin_cut, bin_empty, bin_of_a_model, bin_of_code, bare_pickle, bin_nested]
DAMAGED = [*BINS, bin_a_list, safetensors_pointer, safetensors_cut, safetensors_html]


# config.json


def text(name: str, content: bytes, word: str) -> Callable[[Path], str]:
    def spoil(base: Path) -> str:
        (base / name).write_bytes(content)
        return word

    spoil.__name__ = f"{name} {content[:24]!r}"
    return spoil


def keys(word: str, **values: Any) -> Callable[[Path], str]:
    def spoil(base: Path) -> str:
        configured(base, **values)
        return word

    spoil.__name__ = f"config {values}"[:60]
    return spoil


def config_a_folder(base: Path) -> str:
    (base / "config.json").unlink()
    (base / "config.json").mkdir()
    return "config.json"


def code(base: Path, **values: Any) -> None:
    (base / "own.py").write_text("import os\nos.mkdir('code-was-run')\nclass C: pass\n")
    configured(base, **values)


def code_of_its_own(base: Path) -> str:
    code(base, model_type="acme", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"})
    return "never runs"


def code_on_the_hub(base: Path) -> str:
    code(base, model_type="acme", auto_map={"AutoConfig": "acme/code--own.C"})
    return "never runs"


def tokenizer_of_its_own(base: Path) -> str:
    code(base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "C", "auto_map": {"AutoTokenizer": ["own.C", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "tokenizer.json").unlink()
    return "never run"


CONFIGS = [
    text("config.json", b"", "config.json is damaged"),
    text("config.json", b"{", "config.json is damaged"),
    text("config.json", b"[]", "config.json is damaged"),
    text("config.json", b"[" * 100_000, "config.json is damaged"),
    text("config.json", b'"llama"', "config.json is damaged"),
    text("config.json", '{"model_type": "llama"}'.encode("utf-16"), "UTF-16"),
    text("config.json", '{"note": "é"}'.encode("latin-1"), "not UTF-8"),
    text("config.json", b"{}", "configuration"),
    keys("configuration", model_type="of_next_year"),
    keys("configuration", model_type=3),
    keys("hidden_size", hidden_size="wide"),
    keys("model", num_hidden_layers=-1),
    keys("", num_hidden_layers=9),
    keys("", vocab_size=10**6),
    keys("", hidden_size=float("nan")),
    keys("quantization_config", quantization_config={"quant_method": "gptq", "bits": 4}),
    keys("compressed-tensors", quantization_config={"quant_method": "compressed-tensors"}),
    keys("quant_method", quantization_config={"bits": 4}),
    keys("quant_method", quantization_config={}),
    keys("quant_method", quantization_config={"quant_method": "of_next_year"}),
    keys("configuration", quantization_config=["gptq"]),
    keys("none is", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    keys("none is", quantization_config={"load_in_8bit": True}),
    keys("none is", quantization_config={"quant_method": "mxfp4"}),
    keys("none is", quantization_config={"quant_method": "fp8"}),
    text("generation_config.json", b"{", "generation_config.json"),
    text("generation_config.json", b"[]", "generation_config.json"),
    text("generation_config.json", '{"é": 1}'.encode("latin-1"), "generation_config.json"),
    config_a_folder,
    code_of_its_own,
    code_on_the_hub,
    tokenizer_of_its_own,
]


# Tokenizer files


def far_turn_end(base: Path) -> str:
    """The template ends turns with a token that the embedding has no row for."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<|more {n}|>" for n in range(400)], special_tokens=True)
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_end|>", "<|more 399|>")
    tokenizer.save_pretrained(base)
    return "past the base's embedding of 320 rows"


TOKENIZERS = [
    text("tokenizer.json", b"{", "tokenizer"),
    text("tokenizer.json", b"[]", "tokenizer"),
    text("tokenizer.json", b"", "tokenizer"),
    text("tokenizer_config.json", b"[", "tokenizer_config.json"),
    text("tokenizer_config.json", b"[]", "tokenizer_config.json"),
    text("tokenizer_config.json", '{"é": 1}'.encode("latin-1"), "tokenizer_config.json"),
    text("chat_template.jinja", "{# é #}".encode("latin-1"), "chat_template.jinja"),
    text("chat_template.jinja", "{# é #}".encode("utf-16"), "chat_template.jinja"),
    text("chat_template.jinja", b"{% for %}", "template"),
    far_turn_end,
]


@pytest.mark.parametrize(
    "spoil", [*NAMES, *INDEX, *OTHERS, *DAMAGED, *CONFIGS, *TOKENIZERS], ids=lambda f: f.__name__
)
def test_it_is_refused_by_name(refused, parts, base, here, spoil, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    says = spoil(base)
    for method in (GRAFT, LLAVA):
        said = refused("graft", base, *method, "--vision", parts / "tower", "--out", "g")
        assert says in said, said
    assert not (here / "code-was-run").exists()


@pytest.mark.parametrize("what", ["gone", "a file", "weights", "a loop"])
def test_what_is_no_folder(refused, parts, base, here, what) -> None:
    loop = base.with_name("loop")
    loop.symlink_to(loop)
    names = {"gone": base / "x", "a file": base / "config.json", "weights": base / WEIGHTS}
    given = names.get(what, loop)
    assert str(given) in refused("graft", given, *LLAVA, "--vision", parts / "tower", "--out", "g")


# Read as transformers reads it


def of_seed_7(base: Path, kind: str) -> None:
    """Put other weights beside the base's own, in a form that transformers takes second."""
    other = base.with_name("other")
    save_base(other, "llama", seed=7, tokenizer=False, max_shard_size="60KB")
    if kind == "shards":
        for file in other.glob("model*"):
            shutil.copy(file, base)
    elif kind == "bin":
        torch.save(tiny_model("llama", seed=7).state_dict(), base / "pytorch_model.bin")
    elif kind == "bin beside shards":
        as_bin(base)
        for file in other.glob("model*"):
            shutil.copy(file, base)
    else:
        saved(base, {UP: torch.zeros(2)}, f"{kind}.safetensors")


@pytest.mark.parametrize("kind", ["shards", "bin", "bin beside shards", "model.fp16", "left-over"])
def test_copies_and_fingerprint_are_of_the_files_that_transformers_loads(
    cli, parts, base, here, kind
) -> None:
    of_seed_7(base, kind)
    made = cli("graft", base, *GRAFT, "--vision", parts / "tower", "--out", "g")
    assert made.code == 0, made.err
    loaded = AutoModelForCausalLM.from_pretrained(base).state_dict()
    graft = load_file(here / "g" / "graft.safetensors")
    assert torch.equal(graft["graft.layers.0.mlp.up_proj.weight"], loaded[UP])
    tensors = json.loads((here / "g" / "graft_config.json").read_text())["base"]["fingerprint"]
    assert tensors["tensors"].keys() == loaded.keys()
    assert cli("chat", "g", "hello", "--max-new-tokens", "2").code == 0


@pytest.mark.parametrize("form", [WEIGHTS, "pytorch_model.bin"])
@pytest.mark.parametrize("head", ["another", "the same", "alone", "none"])
def test_a_tied_base_is_tied_as_transformers_ties_it(
    cli, parts, tmp_path_factory, here, form, head
) -> None:
    base = save_base(tmp_path_factory.mktemp("tied") / "base", "qwen2")
    tensors = tensors_of(base)
    if head != "none":
        rows = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = rows.flip(0).clone() if head == "another" else rows.clone()
    if head == "alone":
        tensors.pop("model.embed_tokens.weight")
    saved(base, tensors)
    if form != WEIGHTS:
        as_bin(base)
    made = cli("graft", base, *GRAFT, "--vision", parts / "tower", "--out", "g")
    assert made.code == 0, made.err
    names = load_file(here / "g" / "graft.safetensors").keys()
    assert ("graft.head.weight" in names) == (head == "another")
    said = cli("chat", "g", "hello", "--max-new-tokens", "2")
    assert said.code == 0, said.err
    assert "tie" not in said.err


def test_a_base_that_lost_a_tensor_is_not_loaded_with_random_ones(refused, run, parts) -> None:
    """Without a fingerprint to compare with, loading itself refuses it."""
    base = Path(shutil.copytree(parts / "base", run / "other"))
    tensors = tensors_of(base)
    tensors.pop(UP)
    saved(base, tensors)
    assert UP in refused("chat", run, "hello", "--base", base, "--verify", "off")


def test_bin_files_are_looked_into_before_they_are_named_a_base(base) -> None:
    as_bin(base)
    assert "pytorch_model.bin" in (resolve(base).slow or "")
