"""Every decoder and tower that the plugin takes, and what it refuses at start."""

from __future__ import annotations

import json
import re
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs

import mmgraft_vllm
from mmgraft.export import vllm as vllm_export
from mmgraft.export.vllm import export_vllm
from mmgraft_vllm.model import DECODERS, refuse
from tiny_exports import make_base, make_graft
from vllm_engine import SIZES, Graft, Messages, answers, engine, for_vllm, greedy, image

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")  # of vLLM itself

PAIRS = [
    ("llama", "siglip"), ("mistral", "siglip"), ("mistral", "clip"), ("qwen2", "clip"),
    ("phi3", "siglip"), ("gemma3", "clip"),
]  # fmt: skip
TEXT: Messages = [{"role": "user", "content": "One, two, three: what comes next?"}]


def look(*seeds: int) -> Messages:
    parts: list[Any] = [{"type": "image", "image": image(16, seed)} for seed in seeds]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def test_export_and_plugin_know_the_same_decoders() -> None:
    assert set(vllm_export.DECODERS) == set(DECODERS)


@pytest.mark.parametrize(("arch", "tower"), PAIRS)
def test_rows_are_what_generate_gives(tmp_path: Path, arch: str, tower: str) -> None:
    """The graft's for rows with images, the base's for others; windows are shorter than prompts."""
    make_base(tmp_path, arch, **SIZES)
    run = make_graft(tmp_path, arch, tower, layers=[1, 3])
    export_vllm([run], tmp_path / "out")
    rows, graft = [look(1), TEXT, look(2, 3)], Graft(run)
    with engine(tmp_path / "out", max_num_batched_tokens=32) as llm:
        found = answers(llm.chat([for_vllm(row) for row in rows], greedy(), use_tqdm=False))
    for row, (ids, values) in zip(rows, found, strict=True):
        wanted, likely = graft.answer(row)
        assert ids == wanted
        assert values == pytest.approx(likely, abs=2e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = tmp_path_factory.mktemp("parts")
    make_base(parts, "llama", **SIZES)
    export_vllm([make_graft(parts, layers=[0])], parts / "out")
    return parts / "out"


def settings(folder: Path, **options: Any) -> Any:
    return EngineArgs(str(folder), **{"dtype": "float32", "max_model_len": 128, **options})


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
        ({"enable_lora": True}, "LoRA adapters"),
        ({"quantization": "fp8", "dtype": "bfloat16"}, "a quantised model"),
        ({"enable_prompt_embeds": True}, "embeddings as prompts"),
        ({"enable_mm_embeds": True}, "embeddings as images"),
    ],
)
def test_what_would_be_wrong_is_refused_by_name(
    folder: Path, options: dict[str, Any], what: str
) -> None:
    config = settings(folder, **options).create_engine_config()
    with pytest.raises(ValueError, match=f"does not take {what}; start vLLM without"):
        refuse(config)


@pytest.mark.parametrize(
    ("part", "changed", "what"),
    [
        ("parallel_config", {"use_ubatching": True}, "microbatch overlap"),
        ("parallel_config", {"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ("quant_config", {}, "a quantised model"),
    ],
)
def test_what_a_cpu_cannot_start_is_refused_by_name(
    folder: Path, part: str, changed: dict[str, Any], what: str
) -> None:
    config = settings(folder).create_engine_config()
    refuse(config)
    parts = {name: getattr(config, name) for name in vars(config)}
    parts["quant_config"] = None
    values = {"use_ubatching": False, "pipeline_parallel_size": 1, **changed}
    with pytest.raises(ValueError, match=what):
        refuse(SimpleNamespace(**{**parts, part: SimpleNamespace(**values)}))


def test_a_scalar_gate_is_refused_with_torch_compile(folder: Path) -> None:
    for eager in (False, True):
        config = settings(folder, enforce_eager=eager).create_engine_config()
        config.model_config.hf_config.mmgraft["workflows"][0]["scalar"] = True
        if eager:
            refuse(config)
        else:
            with pytest.raises(ValueError, match="compile with a scalar gate"):
                refuse(config)


def test_another_decoder_is_refused_by_name(folder: Path) -> None:
    config = settings(folder).create_engine_config()
    config.model_config.hf_config.text_config.model_type = "gemma2"
    with pytest.raises(ValueError, match="a gemma2 decoder"):
        refuse(config)


@pytest.mark.parametrize(
    "changed",
    [
        {"mmgraft": {"version": "0.0.1", "workflows": ["mm"]}},
        {"mmgraft": {"version": "0.0.1", "workflows": [{"name": "mm", "layers": [[0, 1]]}]}},
        {"mmgraft": {"version": "0.0.1", "workflows": []}},
        {"mmgraft": {"version": "0.0.1"}},
        {"mrope_section": None},
    ],
    ids=["names alone", "fewer keys", "none", "no list", "plain positions"],
)
def test_a_folder_of_another_mmgraft_is_refused(
    folder: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    copied = copytree(folder, tmp_path / "copied")
    values = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**values, **changed}))
    version = changed.get("mmgraft", values["mmgraft"])["version"]
    with pytest.raises(ValueError, match=f"written by mmgraft {re.escape(version)}, or changed"):
        refuse(settings(copied).create_engine_config())


@pytest.mark.parametrize(
    "lost",
    [
        "language_model.model.layers.1.self_attn.k_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.model.norm.weight",
        "workflows.0.projector.mlp.2.bias",
        "workflows.0.embedding.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.v_proj.bias",
    ],
)
def test_a_folder_that_lacks_a_tensor_is_refused(folder: Path, tmp_path: Path, lost: str) -> None:
    """VLLM itself takes one of several that make up a linear layer for all, or none at all."""
    copied = copytree(folder, tmp_path / "copied")
    tensors = load_file(copied / "model.safetensors")
    del tensors[lost]
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(ValueError, match="the folder lacks 1 tensors, such as"):
        engine(copied).__enter__()


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0+cpu"])
def test_a_release_that_was_not_tested_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    said = f"from 0.32.0 to before 0.33, and this is {re.escape(version)};"
    with pytest.raises(RuntimeError, match=said):
        mmgraft_vllm.register()
