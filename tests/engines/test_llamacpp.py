"""GGUF exports through llama.cpp's own server give the graft's greedy ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import mmgraft.export.gguf.export as gguf_export
from llama_grafts import OwnGraft, disagreements, noise, served
from llama_server import llama_server
from mmgraft.demo import assets
from mmgraft.errors import UsageError
from mmgraft.export.gguf.export import export_gguf
from mmgraft.export.gguf.tokenizer import Vocabulary
from mmgraft.model.files.graft_file import TemplateChoice
from tiny import save_base, tiny_model
from tiny_exports import make_graft
from tiny_gguf import write_gguf

QUESTION = "What colour is the square in the picture?"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "head_dim": 12}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("method", ["iaa", "llava"])
def test_greedy_ids_are_the_grafts(tmp_path: Path, name: str, method: str) -> None:
    arch, values = BASES[name]
    base = save_base(tmp_path / "base", arch, **values)
    run = make_graft(tmp_path, arch, tower="siglip", method=method, base=base)
    result = export_gguf(run, tmp_path / "out", outtype="f32")
    assert ("no longer the base's" in result.notes[0]) == (method == "iaa")
    own, seen = OwnGraft(run), set[int]()
    with llama_server(tmp_path / "out/model.gguf", tmp_path / "out/mmproj.gguf", 128) as server:
        for images in ((noise(),), (noise(seed=1), noise(seed=2)), ()):
            prompt, ids = served(server, QUESTION, *images)
            assert prompt.count("__>\n") == bool(images)
            assert disagreements(ids, own.likeliest(ids, QUESTION, *images)) == []
            seen |= set(ids)
    assert len(seen) > 1, "answers that are all alike prove little"


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_smaller_types_are_close(tmp_path: Path, outtype: str) -> None:
    run = make_graft(tmp_path, "qwen2", tower="siglip", layers=[1])
    export_gguf(run, tmp_path / "out", outtype=outtype)
    with llama_server(tmp_path / "out/model.gguf", tmp_path / "out/mmproj.gguf", 128) as server:
        _, ids = served(server, QUESTION, noise(), count=4)
    own = OwnGraft(run).likeliest(ids, QUESTION, noise())
    assert [step for step in disagreements(ids, own) if own[step][1] > 0.2] == []


@pytest.mark.parametrize("template", [TemplateChoice(kind="plain"), TemplateChoice(kind="chat")])
def test_the_mmproj_beside_a_gguf_of_the_base(tmp_path: Path, template: TemplateChoice) -> None:
    """Text is the base's to the last digit; images are the graft's."""
    run = make_graft(tmp_path, tower="siglip", method="llava", template=template)
    export_gguf(run, tmp_path / "out", kind="mmproj", outtype="f32")
    base = tmp_path / "base.gguf"
    write_gguf(tiny_model("llama"), base)
    own = OwnGraft(run)
    chat = (tmp_path / "out/chat_template.jinja").read_text()
    with llama_server(base, tmp_path / "out/mmproj.gguf", 128, template=chat) as server:
        prompt, ids = served(server, QUESTION, noise())
        beside = served(server, "Why?")
    assert "__>\nWhat" in prompt
    assert disagreements(ids, own.likeliest(ids, QUESTION, noise())) == []
    with llama_server(base, template=chat) as server:
        assert served(server, "Why?") == beside
    assert disagreements(beside[1], own.likeliest(beside[1], "Why?")) == []


def test_clip_is_still_read_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_graft(tmp_path, tower="clip", method="llava")
    with pytest.raises(UsageError, match="issue 25814"):
        export_gguf(run, tmp_path / "out")
    monkeypatch.setattr(gguf_export, "check_parts", lambda made_of: "llama")
    export_gguf(run, tmp_path / "out", outtype="f32")
    own, wrong = OwnGraft(run), 0
    with llama_server(tmp_path / "out/model.gguf", tmp_path / "out/mmproj.gguf", 128) as server:
        for seed in range(4):
            _, ids = served(server, QUESTION, noise(seed=seed))
            wrong += len(disagreements(ids, own.likeliest(ids, QUESTION, noise(seed=seed))))
    assert wrong, "this release of llama.cpp reads CLIP as transformers does: allow CLIP"


def test_other_sizes_are_padded(tmp_path: Path) -> None:
    """Why squares are to be sent: a wide image is not what transformers makes of it."""
    run = make_graft(tmp_path, tower="siglip", method="llava")
    export_gguf(run, tmp_path / "out", outtype="f32")
    own, wide = OwnGraft(run), [noise(64, 16, seed) for seed in range(4)]
    wrong = 0
    with llama_server(tmp_path / "out/model.gguf", tmp_path / "out/mmproj.gguf", 128) as server:
        for image in wide:
            _, ids = served(server, QUESTION, image)
            wrong += len(disagreements(ids, own.likeliest(ids, QUESTION, image)))
            squashed = image.resize((16, 16), 3)
            _, ids = served(server, QUESTION, squashed)
            assert disagreements(ids, own.likeliest(ids, QUESTION, image)) == []
    assert wrong, "this release squashes as transformers does: take the note away"


def real_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(assets.smollm2())


def test_a_published_gguf_beside_a_grafts_mmproj(tmp_path: Path) -> None:
    """SmolLM2 as its package has it, quantised: eyes beside it change no text."""
    assert assets.LANGUAGE.folder is not None
    base = assets.LANGUAGE.folder / assets.SMOLLM2_GGUF
    run = make_graft(tmp_path, tower="siglip", method="llava", base=assets.smollm2())
    export_gguf(run, tmp_path / "out", kind="mmproj")
    chat = (tmp_path / "out/chat_template.jinja").read_text()
    with llama_server(base, tmp_path / "out/mmproj.gguf", 256, template=chat) as server:
        beside = served(server, QUESTION)
        assert len(served(server, QUESTION, noise())[1]) == 10
    with llama_server(base, context=256) as server:
        assert served(server, QUESTION) == beside


@pytest.mark.parametrize(("method", "config"), [("llava", {}), ("iaa", {"layers": [5, 20]})])
def test_a_real_model_with_images(tmp_path: Path, method: str, config: dict[str, Any]) -> None:
    """Its answers may end anywhere, where a tiny random model's never do."""
    run = make_graft(tmp_path, tower="siglip", method=method, base=assets.smollm2(), **config)
    export_gguf(run, tmp_path / "out", outtype="f32")
    own = OwnGraft(run)
    with llama_server(tmp_path / "out/model.gguf", tmp_path / "out/mmproj.gguf", 256) as server:
        for images in ((noise(),), (noise(seed=1),), (noise(seed=2),), ()):
            _, ids = served(server, QUESTION, *images, count=12)
            assert disagreements(ids, own.likeliest(ids, QUESTION, *images)) == []


def split(digits: str) -> dict[str, Any]:
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip
    steps = [
        {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": steps}


def with_rules(**values: Any) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, cutting words by other rules."""
    tokenizer = real_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["ignore_merges"] = values.pop("ignore_merges", False)
    backend = Tokenizer.from_str(json.dumps({**state, **values}))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token, chat_template=tokenizer.chat_template,
    )  # fmt: skip


DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
RULES: dict[str, dict[str, Any]] = {
    "gpt-2": {},
    "smollm": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}},
    "llama-bpe": {"pre_tokenizer": split("{1,3}"), "ignore_merges": True},
    "qwen2": {"pre_tokenizer": split(""), "normalizer": {"type": "NFC"}},
}


def graft_with(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, more: int = 0) -> Path:
    base = save_base(tmp_path / "base", "llama", vocab_size=len(tokenizer) + more)
    tokenizer.save_pretrained(base)
    return make_graft(tmp_path, tower="siglip", method="llava", base=base)


@pytest.mark.parametrize("name", RULES)
def test_a_real_vocabulary_by_every_rule(tmp_path: Path, name: str) -> None:
    tokenizer = with_rules(**RULES[name])
    run = graft_with(tmp_path, tokenizer, more=3 * (name == "smollm"))
    assert Vocabulary(tokenizer, 10).pre == name
    notes = export_gguf(run, tmp_path / "out", outtype="f32").notes  # compares its own texts
    assert any("NFC" in note for note in notes) == (name == "qwen2")
    texts = [
        "12345 cats' tails, I'm 3.5 years",
        "　全角 and  gaps\n\n\n",
        "naïve café 🙂🙂",
        "<|im_end|>x",
    ]
    with llama_server(tmp_path / "out/model.gguf") as server:
        for text in texts:
            given = server.post("/tokenize", content=text)["tokens"]
            assert given == tokenizer(text)["input_ids"], text
        prompt, ids = served(server, QUESTION)
        own = OwnGraft(run)
        written = own.processor([{"role": "user", "content": QUESTION}])["input_ids"][0].tolist()
        assert server.post("/tokenize", content=prompt)["tokens"] == written
        assert disagreements(ids, own.likeliest(ids, QUESTION)) == []


def test_ids_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a release read the rules otherwise than the one before."""
    run = graft_with(tmp_path, with_rules(**RULES["qwen2"]))
    plain = Vocabulary.__init__

    def wrong(self: Vocabulary, *arguments: Any) -> None:
        plain(self, *arguments)
        self.pre = "gpt-2"

    monkeypatch.setattr(Vocabulary, "__init__", wrong)
    with pytest.raises(UsageError, match="differ there"):
        export_gguf(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_server_knows_what_it_sees_with(tmp_path: Path) -> None:
    run = make_graft(tmp_path, tower="siglip", layers=[1])
    export_gguf(run, tmp_path / "out")
    with llama_server(tmp_path / "out/model.gguf", tmp_path / "out/mmproj.gguf", 128) as server:
        told = server.get("/props")
        assert told["modalities"]["vision"] is True
        assert told["media_marker"].startswith("<__media")
