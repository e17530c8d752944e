"""GGUF exports: what they hold, and what is refused before anything is written.

What llama.cpp makes of them is in tests/engines.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import gguf
import jinja2
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from mmgraft.errors import UsageError
from mmgraft.export.folder import check_folder
from mmgraft.export.gguf.export import export_gguf, media_template
from mmgraft.export.gguf.tokenizer import Vocabulary
from mmgraft.export.llava.processor import image_template
from mmgraft.model.files.graft_file import GraftFile, TemplateChoice
from mmgraft.model.files.load import load_processor
from mmgraft.vision.projectors.configs import LinearConfig
from mmgraft.vision.spec import ProjectorSpec, VisionSpec
from text_tokenizers import KINDS, text_tokenizer
from tiny import save_base, tiny_siglip_dir
from tiny_exports import change_record, make_graft
from tiny_tokenizer import EOS_ID, IM_END_ID, tiny_tokenizer
from tiny_towers import save_tower


def values(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {key: field.contents() for key, field in reader.fields.items()}


def test_what_the_files_hold(tmp_path: Path) -> None:
    run = make_graft(tmp_path, "qwen3", tower="siglip", layers=[1, 3])
    result = export_gguf(run, tmp_path / "out", outtype="f32")
    assert sorted(result.files) == ["README.md", "mmproj.gguf", "model.gguf"]
    assert result.notes[0].endswith("no longer the base's: rows without an image run mm too")
    text = gguf.GGUFReader(tmp_path / "out/model.gguf")
    told = values(text)
    assert told["general.architecture"] == "qwen3"
    assert told["qwen3.block_count"] == 6
    assert told["qwen3.attention.key_length"] == told["qwen3.attention.value_length"] == 12
    assert told["tokenizer.ggml.pre"] == "gpt-2"
    assert told["tokenizer.ggml.add_bos_token"] is False
    assert (told["tokenizer.ggml.eos_token_id"], told["tokenizer.ggml.eot_token_id"]) == (
        EOS_ID,
        IM_END_ID,
    )
    tokens, kinds = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 320, "as many as the base's embedding has rows"
    assert (kinds[EOS_ID], kinds[50], kinds[-1]) == (3, 1, 5)
    assert "<image>" not in tokens, "in text it is text"
    sight = values(gguf.GGUFReader(tmp_path / "out/mmproj.gguf"))
    assert sight["clip.vision.feature_layer"] == [2]
    assert sight["clip.vision.projection_dim"] == 32
    own = load_file(run / "graft.safetensors")
    by_name = {tensor.name: tensor.data for tensor in text.tensors}
    inserted = own["graft.layers.0.self_attn.q_norm.weight"]
    assert np.array_equal(by_name["blk.2.attn_q_norm.weight"], inserted)
    assert np.array_equal(by_name["output_norm.weight"], own["graft.norm.weight"])
    assert "model.gguf --mmproj out/mmproj.gguf" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("outtype", "matrix", "sight"),
    [("f32", "F32", "F32"), (None, "F16", "F16"), ("q8_0", "Q8_0", "F16")],
)
def test_types(tmp_path: Path, outtype: str | None, matrix: str, sight: str) -> None:
    """Rows of 32 and 48 numbers: those of 48 are no whole blocks of Q8_0."""
    run = make_graft(tmp_path, tower="siglip", layers=[1])
    listed = export_gguf(run, tmp_path / "out", outtype=outtype, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert not listed.written
    export_gguf(run, tmp_path / "out", outtype=outtype)
    files = {
        name: {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / name).tensors}
        for name in listed.files
    }
    text, seen = files["model.gguf"], files["mmproj.gguf"]
    assert text["blk.0.attn_q.weight"].tensor_type.name == matrix
    assert text["blk.0.ffn_down.weight"].tensor_type.name == ("F16" if matrix == "Q8_0" else matrix)
    assert text["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert seen["v.blk.0.attn_q.weight"].tensor_type.name == sight
    for name, tensors in files.items():
        assert listed.files[name] == sum(int(tensor.n_bytes) for tensor in tensors.values())


def test_the_mmproj_alone(tmp_path: Path) -> None:
    run = make_graft(tmp_path, tower="siglip", method="llava")
    result = export_gguf(run, tmp_path / "out", kind="mmproj")
    assert sorted(result.files) == ["README.md", "chat_template.jinja", "mmproj.gguf"]
    assert "still computed by the base's own layers" in result.notes[0]
    assert (
        "--chat-template-file out/chat_template.jinja" in (tmp_path / "out/README.md").read_text()
    )


@pytest.mark.parametrize(
    ("kind", "method", "config", "record", "reason"),
    [
        ("mmproj", "iaa", {"layers": [1]}, {}, "no longer the base's.*--to gguf"),
        ("mmproj", "llava", {}, {"base_trained": True}, "trained with it"),
        ("mmproj", "lora", {}, {}, "it lacks the adapters"),
        ("gguf", "lora", {}, {}, "it lacks the adapters"),
        ("gguf", "iaa", {"structure": "b"}, {}, "through gates"),
        ("gguf", "wings", {"rank": 4}, {}, "learners and a router"),
    ],
)
def test_grafts_that_are_refused(
    tmp_path: Path, kind: Any, method: str, config: Any, record: dict[str, Any], reason: str
) -> None:
    run = make_graft(tmp_path, tower="siglip", method=method, **config)
    change_record(run, **record)
    refused(run, reason, kind)


def refused(run: Path, reason: str, kind: Any = "gguf") -> None:
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=reason):
            export_gguf(run, run.parent / "out", kind=kind, dry_run=dry_run)
    assert not (run.parent / "out").exists()


@pytest.mark.parametrize(
    ("arch", "change", "reason"),
    [
        ("mistral", {}, "MistralForCausalLM is not written"),
        ("gemma3", {}, "Gemma3ForCausalLM is not written"),
        ("gpt2", {}, "GPT2LMHeadModel is not written"),
        ("qwen2_sliding", {}, "see a window alone"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, r"\(dynamic\)"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"\(yarn\)"),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, r"\(linear\)"),
    ],
)
def test_bases_that_are_refused(
    tmp_path: Path, arch: str, change: dict[str, Any], reason: str
) -> None:
    if "rope_parameters" in change:
        change = {"rope_parameters": {"rope_theta": 500.0, **change["rope_parameters"]}}
    base = save_base(tmp_path / "base", arch, **change)
    run = make_graft(tmp_path, tower="siglip", method="llava", base=base)
    refused(run, reason, "gguf")
    refused(run, reason, "mmproj")


def test_towers_that_are_refused(tmp_path: Path) -> None:
    refused(make_graft(tmp_path, tower="clip", method="llava"), "issue 25814")
    for name, change, reason in (
        ("vit", {}, "not SigLIP"),
        ("siglip", {"hidden_act": "gelu"}, "its activation is gelu"),
    ):
        folder = tmp_path / f"{name}-tower"
        tiny_siglip_dir(folder) if name == "siglip" else save_tower(folder, name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        spec = VisionSpec(id=str(folder))
        refused(make_graft(tmp_path, tower=spec, method="llava", name=name), reason)


@pytest.mark.parametrize(
    "change",
    [
        {"rescale_factor": 1 / 127},
        {"do_rescale": False},
        {"do_normalize": False, "image_mean": None},
        {"size": {"shortest_edge": 16}},
    ],
)
def test_pixels_that_llama_cpp_would_not_make(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tiny_siglip_dir(tmp_path / "tower")
    path = folder / "preprocessor_config.json"
    given = json.loads(path.read_text())
    if "size" in change:  # a processor that crops to less than the tower sees, stretched again
        change = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24},
                  "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}  # fmt: skip
    path.write_text(json.dumps({**given, **change}))
    refused(
        make_graft(tmp_path, tower=VisionSpec(id=str(folder)), method="llava"),
        "changes a square of its size",
    )


@pytest.mark.parametrize("projector", [LinearConfig(), ProjectorSpec(norm=True)])
def test_projectors_that_are_refused(tmp_path: Path, projector: Any) -> None:
    run = make_graft(tmp_path, tower="siglip", method="llava", projector=projector)
    refused(run, "its projector")


def state(**change: Any) -> dict[str, Any]:
    made = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    return {**made, **change, "model": {**made["model"], **change.get("model", {})}}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TOKEN = {
    "id": 1, "content": "<|eos|>", "single_word": False, "lstrip": False, "rstrip": False,
    "normalized": False, "special": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pre_tokenizer": {**BYTES, "add_prefix_space": True}}, "cuts text into words otherwise"),
        ({"pre_tokenizer": {**BYTES, "use_regex": False}}, "cuts text into words otherwise"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": False}, BYTES]}}, "otherwise"),
        ({"pre_tokenizer": None}, "otherwise"),
        ({"normalizer": {"type": "Lowercase"}}, "normalises text"),
        ({"model": {"ignore_merges": True}}, "ignore_merges"),
        ({"model": {"dropout": 0.1}}, "a setting that llama.cpp has not"),
        ({"added_tokens": [{**TOKEN, "lstrip": True}]}, "white space around"),
        ({"added_tokens": [{**TOKEN, "single_word": True}]}, "white space around"),
    ],
)  # fmt: skip
def test_tokenizers_that_are_refused(change: dict[str, Any], reason: str) -> None:
    backend = Tokenizer.from_str(json.dumps(state(**change)))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(UsageError, match=reason):
        Vocabulary(tokenizer, 320)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte_bpe"])
def test_other_kinds_of_tokenizers(kind: str) -> None:
    with pytest.raises(UsageError, match="not BPE"):
        Vocabulary(text_tokenizer(kind), 700)


def test_what_stands_around_a_text(tmp_path: Path) -> None:
    """A base that puts a token before texts, with a template of plain text and with one of chat."""
    base = save_base(tmp_path / "base", "llama")
    tiny_tokenizer(add_bos=True).save_pretrained(base)
    for kind, wanted in (("plain", True), ("chat", False)):
        run = make_graft(
            tmp_path, tower="siglip", method="llava", base=base, name=kind,
            template=TemplateChoice(kind=kind),
        )  # fmt: skip
        export_gguf(run, tmp_path / f"out-{kind}")
        told = values(gguf.GGUFReader(tmp_path / f"out-{kind}/model.gguf"))
        assert told["tokenizer.ggml.add_bos_token"] is wanted
        assert told["tokenizer.ggml.add_eos_token"] is False


MARKER = "<__media_x7__>"
IMAGE, OTHER = {"type": "image"}, {"type": "text", "text": "why?"}


@pytest.fixture(scope="module", params=["chat", "plain"])
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The processor of a graft with a chat template, and of one with plain text."""
    folder = tmp_path_factory.mktemp("templates")
    base = save_base(folder / "base", "llama")
    choice = TemplateChoice(kind=request.param)
    run = make_graft(folder, tower="siglip", method="llava", base=base, template=choice)
    return load_processor(GraftFile.read(run), base, None)


@pytest.mark.parametrize(
    "content",
    ["hello", [IMAGE, OTHER], [OTHER, IMAGE], [IMAGE, IMAGE, OTHER], [OTHER, IMAGE, OTHER],
     [IMAGE, {"type": "text", "text": "\nwhy?"}], "a <__media b __> c"],
)  # fmt: skip
def test_the_template_writes_what_the_graft_was_trained_on(processor: Any, content: Any) -> None:
    """Images as a server hands them over: as a text, or as a list of texts."""
    stock = image_template(processor.template, processor.tokenizer, MARKER)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)

    def written(template: Any, form: Any) -> str:
        turns = [
            {"role": "user", "content": form},
            {"role": "assistant", "content": "so"},
            {"role": "user", "content": "and?"},
        ]
        return environment.from_string(str(template)).render(
            messages=turns, add_generation_prompt=True, bos_token="<|bos|>", eos_token="<|eos|>"
        )

    wanted, template = written(stock, content), media_template(processor)
    if isinstance(content, str):
        assert written(template, content) == wanted
        return
    texts = [part.get("text", MARKER) for part in content]
    assert written(template, "".join(texts)) == wanted
    assert written(template, [{"type": "text", "text": text} for text in texts]) == wanted


def test_numbers_too_large_for_half_precision(tmp_path: Path) -> None:
    run = make_graft(tmp_path, tower="siglip", layers=[1])
    own = load_file(run / "graft.safetensors")
    own["graft.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(own, run / "graft.safetensors")
    for outtype in ("f16", "q8_0"):
        with pytest.raises(UsageError, match=r"too large for .* give --outtype f32"):
            export_gguf(run, tmp_path / "out", outtype=outtype)
        assert not (tmp_path / "out").exists()
    export_gguf(run, tmp_path / "out", outtype="f32")


def test_force_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    run = make_graft(tmp_path, tower="siglip", method="llava")
    for kind in ("gguf", "mmproj"):
        out = tmp_path / kind
        export_gguf(run, out, kind=kind)
        assert check_folder(out, run, force=True) == out
        (out / "mmproj.gguf").write_bytes(b"GGUF of my own")
        with pytest.raises(UsageError, match="something else than an earlier export"):
            check_folder(out, run, force=True)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_graft(tmp_path, tower="siglip", method="llava")
    monkeypatch.setattr("mmgraft.export.gguf.export.find_spec", lambda name: None)
    refused(run, r"mmgraft\[gguf\]")


def test_an_engine_that_does_not_load_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with another release of llama.cpp, or without memory for the model."""

    class Engine(types.ModuleType):
        CommonParams = MagicMock

        def Server(self, params: Any) -> None:
            assert Path(params.model.path).is_file()
            raise RuntimeError("Failed to init server")

    run = make_graft(tmp_path, tower="siglip", method="llava")
    monkeypatch.setitem(sys.modules, "xllamacpp", Engine("xllamacpp"))
    monkeypatch.setattr("mmgraft.export.gguf.export.find_spec", lambda name: True)
    with pytest.raises(UsageError, match="does not load the export: Failed"):
        export_gguf(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_rules_of_qwens_own_class() -> None:
    """As transformers itself builds it, whatever a file says."""
    vocabulary = Vocabulary(Qwen2Tokenizer(), 4)
    assert (vocabulary.pre, vocabulary.composes) == ("qwen2", True)
