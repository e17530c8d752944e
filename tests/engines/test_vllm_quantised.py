"""A base stored quantised, with a projector beside it: its rows are those of stock vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmgraft.errors import UsageError
from mmgraft.export.vllm import export_vllm
from tiny_exports import make_base, make_graft
from vllm_engine import SIZES, Messages, answers, engine, for_vllm, greedy, image

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")  # of vLLM itself

FULL = "model.layers.1."
"""A layer that is left in full."""
TEXT: Messages = [{"role": "user", "content": "One, two, three: what comes next?"}]
LOOK: Messages = [
    {
        "role": "user",
        "content": [{"type": "image", "image": image(16, 1)}, {"type": "text", "text": "Well?"}],
    }
]


def int8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    whole = (weight / scale).round().clamp(-127, 127).to(torch.int8)
    return {"weight": whole, "weight_scale": scale.bfloat16()}


def int4(weight: Tensor, group: int = 32) -> dict[str, Tensor]:
    """Eight numbers of four bits in one of 32, and a scale for each group of a row."""
    rows, columns = weight.shape
    groups = weight.view(rows, columns // group, group)
    scale = groups.abs().amax(2, keepdim=True) / 7
    whole = (groups / scale).round().clamp(-8, 7).long() + 8
    packed = (whole.view(rows, -1, 8) << 4 * torch.arange(8)).sum(-1)
    return {
        "weight_packed": torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32),
        "weight_scale": scale[:, :, 0].bfloat16(),
        "weight_shape": torch.tensor([rows, columns]),
    }


def weights(bits: int, **values: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **values}


FORMS: dict[str, Any] = {
    "int8": (
        int8, "int-quantized", weights(8, strategy="channel"),
        weights(8, strategy="token") | {"dynamic": True},
    ),
    "int4": (int4, "pack-quantized", weights(4, strategy="group", group_size=32), None),
}  # fmt: skip


def quantised_base(folder: Path, form: str) -> Path:
    """A tiny Llama as llm-compressor stores one."""
    pack, called, how, inputs = FORMS[form]
    base = make_base(folder, "llama", **{**SIZES, "intermediate_size": 64})
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith("proj.weight") and not name.startswith(FULL):
            stem = name.removesuffix("weight")
            tensors |= {stem + part: one for part, one in pack(tensor.float()).items()}
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    group = {"targets": ["Linear"], "weights": how, "input_activations": inputs}
    left = [f"{FULL}{part}_proj" for part in ("self_attn.q", "self_attn.k", "self_attn.v")]
    left += [f"re:{FULL}(self_attn.o|mlp.*)_proj", "lm_head"]
    config = json.loads((base / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "format": called, "config_groups": {"group_0": group}, "ignore": left,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    return base


def stock(folder: Path, out: Path) -> Path:
    """The same tensors as vLLM's own LLaVA model reads them."""
    copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    del config["mmgraft"], config["mrope_section"]
    config["architectures"] = ["LlavaForConditionalGeneration"]
    (out / "config.json").write_text(json.dumps(config))
    names = {"workflows.0.projector.mlp.0": "linear_1", "workflows.0.projector.mlp.2": "linear_2"}
    tensors = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        stem, _, part = name.rpartition(".")
        place = f"multi_modal_projector.{names[stem]}" if stem in names else stem
        tensors[f"{place}.{part}"] = tensor
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_of_stock_vllm_bit_for_bit(tmp_path: Path, form: str) -> None:
    base = quantised_base(tmp_path, form)
    export_vllm([make_graft(tmp_path, tower="siglip", method="llava", base=base)], tmp_path / "out")
    found = []
    for folder in (tmp_path / "out", stock(tmp_path / "out", tmp_path / "stock"), base):
        with engine(folder, dtype="bfloat16") as llm:
            rows = [TEXT, LOOK] if folder != base else [TEXT]
            each = []
            for row in rows:
                assert llm.reset_prefix_cache()
                each += answers(llm.chat([for_vllm(row)], greedy(), use_tqdm=False))
            found.append(each)
            model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
            layers = getattr(model, "language_model", model).model.layers
            kinds = [type(one.self_attn.qkv_proj.quant_method).__name__ for one in layers[:2]]
            assert kinds == ["CompressedTensorsLinearMethod", "UnquantizedLinearMethod"]
    ours, its, alone = found
    assert ours == its
    assert ours[:1] == alone
    assert ours[0][0] != ours[1][0]


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8"])
def test_other_forms_are_refused_by_name(tmp_path: Path, method: str) -> None:
    """At the latest by the export: most when the graft is made."""
    base = quantised_base(tmp_path, "int8")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="stored quantised"):
        export_vllm([make_graft(tmp_path, method="llava", base=base)], tmp_path / "out")


def test_inserted_layers_are_refused(tmp_path: Path) -> None:
    """They are copies of the base's, in full."""
    with pytest.raises(UsageError, match=r"stored quantised \(compressed-tensors\)"):
        make_graft(tmp_path, layers=[1], base=quantised_base(tmp_path, "int8"))
