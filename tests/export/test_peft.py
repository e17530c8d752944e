"""Adapters beside a stock LLaVA model give the image rows of the graft, and apart the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmgraft.errors import UsageError
from mmgraft.export.folder import check_folder
from mmgraft.export.llava.export import export_llava
from mmgraft.export.peft import export_peft
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.modeling import GraftedModel
from tiny_exports import make_graft
from tiny_towers import picture


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name
@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("llama", {"alpha": 6.0, "layers": [0, 2]}),
        ("qwen2", {"targets": "attention"}),
        ("gpt2", {"targets": "feedforward"}),  # its linear layers are Conv1D
    ],
)
def test_with_peft(tmp_path: Path, arch: str, config: dict[str, Any]) -> None:
    run = make_graft(tmp_path, arch, method="lora", rank=4, **config)
    stock, adapter = tmp_path / "stock", tmp_path / "adapter"
    notes = export_llava(run, stock).notes
    assert any("--to peft" in note for note in notes)
    export_peft(run, adapter)
    graft = GraftedModel.from_pretrained(run).double()
    processor = AutoProcessor.from_pretrained(stock)
    base = AutoModelForImageTextToText.from_pretrained(stock).double()
    model = PeftModel.from_pretrained(base, str(adapter)).double()
    question = [{"type": "image", "image": picture(16, 16)}, {"type": "text", "text": "why?"}]
    for content in (question, question[1:]):
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True,
            return_tensors="pt", add_generation_prompt=True,
        )  # fmt: skip
        kinds = (inputs["input_ids"] == base.config.image_token_id).long()
        own = {name: inputs[name] for name in inputs if name != "mm_token_type_ids"}
        if "pixel_values" in own:
            own["pixel_values"] = own["pixel_values"].double()
        size = graft.base.config.vocab_size
        ids = own["input_ids"].masked_fill(kinds.bool(), 0)
        with torch.no_grad():
            wanted = graft(**{**own, "input_ids": ids}, mm_token_type_ids=kinds).logits
            given = model(**own).logits[..., :size]
            with model.disable_adapter():
                without = model(**own).logits[..., :size]
        if len(content) > 1:
            torch.testing.assert_close(given, wanted, rtol=0, atol=1e-9)
            assert (without - wanted).abs().max() > 1e-3
        else:  # a server leaves the adapter off
            torch.testing.assert_close(without, wanted, rtol=0, atol=1e-9)
            assert (given - wanted).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("method", "config", "reason"),
    [
        ("lora", {"gate": "token"}, "gate token"),
        ("iaa", {}, "method iaa is no adapter"),
        ("llava", {}, "method llava is no adapter"),
    ],
)
def test_refused(tmp_path: Path, method: str, config: dict[str, Any], reason: str) -> None:
    run = make_graft(tmp_path, method=method, **config)
    with pytest.raises(UsageError, match=reason):
        export_peft(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dry_run_and_what_is_replaced(tmp_path: Path) -> None:
    run = make_graft(tmp_path, method="lora", rank=2)
    out = tmp_path / "out"
    listed = export_peft(run, out, dry_run=True).files
    assert not out.exists()
    assert listed["adapter_model.safetensors"] == sum(
        tensor.nbytes for name, tensor in load_file(run / "graft.safetensors").items()
        if name.startswith("graft.")
    )  # fmt: skip
    export_peft(run, out)
    assert check_folder(out, run, force=True) == out.resolve()
    (out / "adapter_model.safetensors").write_bytes(b"mine")
    with pytest.raises(UsageError, match="something else than an earlier export"):
        check_folder(out, run, force=True)


def test_a_base_that_moved_is_named(tmp_path: Path) -> None:
    run = make_graft(tmp_path, "llama", method="lora", rank=4)
    Path(GraftFile.read(run).base.id).rename(tmp_path / "moved")
    with pytest.raises(UsageError):
        export_peft(run, tmp_path / "none")
    made = export_peft(run, tmp_path / "out", base=str(tmp_path / "moved"))
    assert sorted(made.files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not (tmp_path / "none").exists()
