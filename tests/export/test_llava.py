"""Check what an export to stock LLaVA writes, keeps, and throws away."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)

from mmgraft import GraftedModel
from mmgraft.errors import MMGraftError
from mmgraft.export.folder import sizes_in
from mmgraft.export.llava import config as llava_config
from mmgraft.export.llava import export as llava
from mmgraft.export.llava import tensors as llava_tensors
from mmgraft.export.llava.export import export_llava
from mmgraft.export.llava.fit import gather
from mmgraft.export.llava.tensors import pad_rows
from mmgraft.model.files.graft_file import TemplateChoice
from mmgraft.model.files.save import save_graft
from mmgraft.vision.spec import VisionSpec
from tiny import LAYERS as BASE_LAYERS
from tiny import save_base
from tiny_exports import LAYERS, ROUNDING, change_record, make_base, make_graft, make_tower
from tiny_tokenizer import EOS_ID, IM_END_ID, tiny_tokenizer
from tiny_towers import save_tower


def stock(folder: Path) -> Any:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "arch", ["qwen3_moe", "phi3", "olmo2", "granite", "cohere", "gpt_oss", "smollm3", "gpt2"]
)
def test_other_architectures_are_exact_too(tmp_path: Path, arch: str) -> None:
    """Fused experts, per-layer rotary and windows, scaled logits, a position table, no tying."""
    made = export_llava(make_graft(tmp_path, arch), tmp_path / "out")
    assert made.difference is not None
    assert made.difference <= 1e-5
    stock(tmp_path / "out")


def test_inserted_layers_stand_after_the_ones_they_follow(tmp_path: Path) -> None:
    run = make_graft(tmp_path, "llama")
    export_llava(run, tmp_path / "out")
    ours, base = (
        load_file(run / "graft.safetensors"),
        load_file(tmp_path / "llama/model.safetensors"),
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    name = "self_attn.q_proj.weight"
    order = [(0, None), (0, 0), (1, None), (2, None), (2, 1), (3, None), (3, 2)]
    for number, (layer, inserted) in enumerate(order):
        found = written[f"language_model.model.layers.{number}.{name}"]
        source = base[f"model.layers.{layer}.{name}"]
        expected = source if inserted is None else ours[f"graft.layers.{inserted}.{name}"]
        assert torch.equal(found, expected)
    assert config_of(tmp_path / "out")["text_config"]["num_hidden_layers"] == BASE_LAYERS + 3


OWN = [
    {},
    {"embedding": False},
    {"head": False},
    {"norm": False},
    {"embedding": False, "head": False, "norm": False},
    {"untie": True},
]


@pytest.mark.parametrize("own", OWN, ids=lambda own: "-".join(own) or "all")
@pytest.mark.parametrize("arch", ["qwen2", "llama"], ids=["tied", "untied"])
def test_own_modules_or_the_bases(tmp_path: Path, arch: str, own: dict[str, bool]) -> None:
    made = export_llava(make_graft(tmp_path, arch, **own), tmp_path / "out")
    assert made.difference < ROUNDING
    same = ("embedding" in own) == ("head" in own) and "untie" not in own
    tied = arch == "qwen2" and same
    model = stock(tmp_path / "out")
    embedding = model.get_input_embeddings().weight
    assert (model.lm_head.weight is embedding) == tied
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert ("language_model.lm_head.weight" in names) != tied
    config = config_of(tmp_path / "out")
    assert config.get("tie_word_embeddings", False) == tied


def test_a_llava_graft_keeps_the_decoder(tmp_path: Path) -> None:
    made = export_llava(make_graft(tmp_path, "qwen3", method="llava"), tmp_path / "out")
    assert made.difference < ROUNDING
    assert config_of(tmp_path / "out")["text_config"]["num_hidden_layers"] == BASE_LAYERS
    assert "still computed by the base's own layers" in made.notes[0]


def test_a_projector_stage_has_no_inserted_layers(tmp_path: Path) -> None:
    """IAA's first stage leaves the layers out of the path, and so does an export of it."""
    run = make_graft(tmp_path, "llama")
    change_record(run, state={"active": False})
    made = export_llava(run, tmp_path / "out")
    assert made.difference < ROUNDING
    assert config_of(tmp_path / "out")["text_config"]["num_hidden_layers"] == BASE_LAYERS


def test_a_trained_base_is_the_one_that_is_written(tmp_path: Path) -> None:
    run = make_graft(tmp_path, "llama", method="llava")
    model = GraftedModel.from_pretrained(run)
    model.base.model.layers[1].mlp.up_proj.weight.data += 0.5
    model.workflow().record.base_trained = True
    save_graft(model, run)
    made = export_llava(run, tmp_path / "out")
    assert made.difference < ROUNDING
    assert "the base that was trained with it" in made.notes[0]
    written = load_file(tmp_path / "out" / "model.safetensors")
    trained = load_file(run / "base" / "model.safetensors")
    name = "layers.1.mlp.up_proj.weight"
    assert torch.equal(written[f"language_model.model.{name}"], trained[f"model.{name}"])


def test_a_full_vocabulary_gets_a_row(tmp_path: Path) -> None:
    rows = len(AutoTokenizer.from_pretrained(make_base(tmp_path, "qwen2")))
    base = save_base(tmp_path / "base", "qwen2", vocab_size=rows)
    made = export_llava(make_graft(tmp_path, base=base), tmp_path / "out")
    assert made.difference < ROUNDING
    assert any("one row longer" in note for note in made.notes)
    config = config_of(tmp_path / "out")
    assert config["image_token_index"] == rows
    assert config["text_config"]["vocab_size"] == rows + 1
    model = stock(tmp_path / "out")
    assert model.lm_head.weight.shape[0] == rows + 1
    logits = model(torch.tensor([[3, 90, 88]])).logits[0]
    assert (logits[:, rows] <= logits[:, :rows].max(dim=-1).values).all()
    assert GenerationConfig.from_pretrained(tmp_path / "out").suppress_tokens == [rows]


def test_room_in_the_vocabulary_is_used(tmp_path: Path) -> None:
    rows = len(AutoTokenizer.from_pretrained(make_base(tmp_path, "qwen2")))
    export_llava(make_graft(tmp_path, "qwen2"), tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["image_token_index"] == rows
    assert config["text_config"]["vocab_size"] == 320
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.suppress_tokens is None
    assert settings.eos_token_id == [EOS_ID, IM_END_ID], "the template's end of turn beside its own"


def test_a_new_row_is_the_mean() -> None:
    weight = torch.randn(5, 3)
    padded = pad_rows(weight, 7)
    assert torch.equal(padded[:5], weight)
    torch.testing.assert_close(padded[5:], weight.mean(0).expand(2, 3))
    assert pad_rows(weight, 4) is weight


def test_dtype_is_that_of_every_weight(tmp_path: Path) -> None:
    made = export_llava(make_graft(tmp_path, "gemma3"), tmp_path / "out", dtype="bfloat16")
    assert made.difference is not None
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {
        torch.bfloat16
    }
    assert stock(tmp_path / "out").dtype == torch.bfloat16
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"


def test_a_half_base_stays_half(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", dtype=torch.bfloat16)
    export_llava(make_graft(tmp_path, base=base), tmp_path / "out")
    assert stock(tmp_path / "out").dtype == torch.bfloat16


def test_a_base_in_a_pickle(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert export_llava(make_graft(tmp_path, base=base), tmp_path / "out").difference < ROUNDING


def test_unpacked_experts_are_not_called_packed(tmp_path: Path) -> None:
    """Write gpt-oss's experts, which are published in MXFP4, in full."""
    made_of = gather(make_graft(tmp_path))
    made_of.base_config.quantization_config = {"quant_method": "mxfp4"}
    config = llava_config.llava_config(made_of, 5, 320)
    assert "quantization_config" not in json.dumps(config.to_dict())


def test_shards_one_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_graft(tmp_path, "llama")
    asked: list[list[str]] = []
    read = llava_tensors.read_modules

    def spy(reader: Any, config: Any, paths: list[str], dtype: Any) -> Any:
        asked.append(paths)
        return read(reader, config, paths, dtype)

    monkeypatch.setattr(llava_tensors, "read_modules", spy)
    small = partial(llava.write_shards, max_bytes=60_000)
    monkeypatch.setattr(llava, "write_shards", small)
    export_llava(run, tmp_path / "out")
    assert all(len(paths) == 1 for paths in asked)
    layers = [paths[0] for paths in asked]
    assert sorted(set(layers)) == [f"model.layers.{number}" for number in range(BASE_LAYERS)]
    assert len(layers) <= BASE_LAYERS + 3  # a layer is read again where a shard ends inside it
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 3
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert {index["weight_map"][key] for key in file.keys()} == {shard}  # noqa: SIM118
    stock(tmp_path / "out")


@pytest.mark.parametrize("template", ["bos", "plain", "file"])
def test_templates_and_tokenizers_survive_the_disk(tmp_path: Path, template: str) -> None:
    """The comparison reads them from there: ids that differ would be refused."""
    base = save_base(tmp_path / "base", "llama", tokenizer=False)
    tiny_tokenizer(template == "bos", add_bos=True).save_pretrained(base)
    own = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    chosen = {
        "bos": None,
        "plain": TemplateChoice(kind="plain"),
        "file": TemplateChoice(kind="file", text=own),
    }[template]
    made = export_llava(make_graft(tmp_path, base=base, template=chosen), tmp_path / "out")
    assert made.difference < ROUNDING
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.padding_side == "left"
    assert processor.tokenizer.pad_token == "<|pad|>"


def test_pixels_of_a_tower_with_options(tmp_path: Path) -> None:
    options = {"image_size": 16, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    spec = VisionSpec(id=str(make_tower(tmp_path, "clip")), options=options, feature_layer=-1)
    made = export_llava(make_graft(tmp_path, tower=spec), tmp_path / "out")
    assert made.difference < ROUNDING
    assert config_of(tmp_path / "out")["vision_feature_layer"] == -1


@pytest.mark.parametrize("tower", ["dinov2", "vit"])
def test_other_towers_with_a_class_token(tmp_path: Path, tower: str) -> None:
    save_tower(tmp_path / "tower", tower)
    made = export_llava(
        make_graft(tmp_path, tower=VisionSpec(id=str(tmp_path / "tower"))), tmp_path / "out"
    )
    assert made.difference < ROUNDING
    assert config_of(tmp_path / "out")["vision_feature_select_strategy"] == "default"


def test_it_says_what_it_is(tmp_path: Path, said: list[str]) -> None:
    made = export_llava(make_graft(tmp_path), tmp_path / "small")
    told = "it carries one workflow, mm, and its text answers are no longer the base's"
    assert made.notes[0].startswith(told)
    assert "<image> literally" in made.notes[1]
    note = config_of(tmp_path / "small")["mmgraft"]
    assert note["note"].startswith(told)
    assert note["inserted_after"] == LAYERS
    card = (tmp_path / "small" / "README.md").read_text()
    assert told[2:] in card
    assert "inserted after 0, 2, 3" in card
    assert str(tmp_path) not in "".join(
        path.read_text() for path in (tmp_path / "small").iterdir() if path.suffix != ".safetensors"
    )
    assert any("stock transformers" in line for line in said)
    assert made.files == sizes_in(tmp_path / "small")


def test_a_dry_run_knows_the_size_and_writes_nothing(tmp_path: Path) -> None:
    run = make_graft(tmp_path)
    made = export_llava(run, tmp_path / "out", dry_run=True)
    assert not made.written
    assert not (tmp_path / "out").exists()
    export_llava(run, tmp_path / "out")
    real = sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert made.files == {"model.safetensors": real}


def test_a_model_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = make_graft(tmp_path), tmp_path / "out"
    export_llava(run, out)
    before = sizes_in(out)

    def wrong(weight: Tensor, rows: int) -> Tensor:
        changed = weight.clone()
        changed[90] += 0.01  # one token of the question, by a little
        return changed

    monkeypatch.setattr(llava_tensors, "pad_rows", wrong)
    with pytest.raises(MMGraftError, match="logits differ from the graft's by") as failed:
        export_llava(run, out)
    assert failed.value.exit_code == 1
    assert sizes_in(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "llama", "out", "run"]


def test_a_list_that_was_not_stretched_is_found_by_its_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM3 with its rotary layers shifted: the mistake that methods.md tells of."""
    run = make_graft(tmp_path, "smollm3")
    stretch = llava_config.stretch

    def forgetful(config: Any, sources: list[int]) -> Any:
        made = stretch(config, sources)
        made.no_rope_layers = [1, 0] * 3 + [1]
        return made

    monkeypatch.setattr(llava_config, "stretch", forgetful)
    with pytest.raises(MMGraftError, match="logits differ"):
        export_llava(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_ids_and_pixels_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = make_graft(tmp_path), tmp_path / "out"
    save = llava.write_small_files

    def spoil(name: str, old: str, new: str) -> None:
        def written(plan: Any, folder: Path) -> None:
            save(plan, folder)
            text = (folder / name).read_text()
            assert old in text
            (folder / name).write_text(text.replace(old, new))

        monkeypatch.setattr(llava, "write_small_files", written)

    spoil("chat_template.jinja", "+ '<|im_end|>'", "+ ' <|im_end|>'")
    with pytest.raises(MMGraftError, match="do not give the graft's ids"):
        export_llava(run, out)
    spoil("processor_config.json", '"resample": 3', '"resample": 0')
    with pytest.raises(MMGraftError, match="does not give the graft's pixels"):
        export_llava(run, out)
    assert not out.exists()
