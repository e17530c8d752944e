"""A frozen base in nf4: text bit for bit, decoding from a cache, training through it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from decoding import WORDS, differences
from grafting import (
    CONFIGS,
    batch,
    distance,
    every_method,
    logits_of,
    own,
    perturb,
    rows,
    text_labels,
    trained_groups,
)
from mmgraft import GraftedModel
from mmgraft.basefiles import resolve
from mmgraft.errors import UsageError
from mmgraft.model.files.create import create_graft
from mmgraft.model.files.load import load_base
from mmgraft.model.files.save import save_graft
from mmgraft.model.kernels.quantization import assert_unquantized, quantization_config
from tiny import save_base, tiny_clip_dir, tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes")

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # the CPU kernel takes blocks of 64
ARCHS: dict[str, dict[str, int]] = {"llama": WIDE, "gemma3": {**WIDE, "head_dim": 16}, "phi": WIDE}


class Bench:
    """Bases in 4-bit and grafts on them, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tower = folder, str(folder / "tower")
        self.grafted, self.plain = cache(self._grafted), cache(self._plain)
        for arch in ARCHS:
            save_base(folder / arch, arch, **ARCHS[arch])
        tiny_clip_dir(self.tower)

    def _plain(self, arch: str) -> PreTrainedModel:
        """The base in nf4, loaded as transformers loads it."""
        config = quantization_config("nf4", torch.float32)
        model = AutoModelForCausalLM.from_pretrained(
            self.folder / arch, quantization_config=config, dtype=torch.float32
        )
        return model.eval()

    def _grafted(self, arch: str, method: str) -> GraftedModel:
        return perturb(self.load(arch, method))

    def load(self, arch: str, method: str) -> GraftedModel:
        folder = self.folder / f"{arch}-{method}"
        if not folder.exists():
            create_graft(str(self.folder / arch), self.tower, CONFIGS[method], folder)
        return GraftedModel.from_pretrained(folder, quantization="nf4", dtype="float32")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("nf4"))


def images(*words: str, seed: int = 0) -> dict[str, Tensor]:
    inputs = batch(rows(*words, seed=seed), "left")
    return {**inputs, "image_features": inputs["image_features"][..., :16]}


@pytest.mark.parametrize("arch", ARCHS)
@every_method
def test_text_is_the_quantised_bases_bit_for_bit(bench: Bench, arch: str, method: str) -> None:
    model, base, inputs = (
        bench.grafted(arch, method),
        bench.plain(arch),
        batch(rows("t" * 9, "t" * 13), "left"),
    )
    assert torch.equal(logits_of(model, inputs), logits_of(base, inputs))
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(model.generate(**inputs, **options), base.generate(**inputs, **options))
    exact = tiny_model(arch, **ARCHS[arch])
    assert distance(logits_of(base, inputs), logits_of(exact, inputs)) > 1e-2  # it is in 4-bit


def exact_product(layer: Any, x: Tensor) -> Tensor:
    """A 4-bit layer's own weights, unpacked, times ``x``, nothing rounded to bfloat16."""
    unpack = bitsandbytes.functional.dequantize_4bit
    weight = unpack(layer.weight.data, layer.weight.quant_state).to(x.dtype)
    return torch.nn.functional.linear(x, weight, layer.bias)


@pytest.mark.parametrize("arch", ARCHS)
@every_method
def test_a_text_row_beside_an_image_and_the_cache(
    bench: Bench, arch: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By exact products of the 4-bit weights; by the kernel at nearly all positions.

    Where the CPU has bfloat16 instructions the 4-bit kernel rounds what it gets to bfloat16, so
    the last bit of fp32 can move a position by 1e-2 and more, in the base as with a graft.
    """
    model, base = bench.grafted(arch, method), bench.plain(arch)
    inputs, alone = images(*WORDS), batch(rows(*WORDS)[2:])

    def moved() -> Tensor:
        beside, plain = own(logits_of(model, inputs), inputs)[2], logits_of(base, alone)[0]
        cached = [differences(model, images(*WORDS, seed=seed)) for seed in (0, 1, 2)]
        return torch.cat([(beside - plain).abs().amax(-1), *cached])

    by_kernel = moved()
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", exact_product)
    assert moved().max() < 1e-4
    assert by_kernel.median() < 1e-5


@every_method
def test_greedy_decoding_equals_full_forwards(bench: Bench, method: str) -> None:
    model, inputs = bench.grafted("llama", method), images(*WORDS)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options, pad_token_id=2, use_cache=False)
    assert torch.equal(model.generate(**inputs, **options, pad_token_id=2), expected)


@every_method
def test_it_is_trained_through_and_saved_and_text_stays(
    bench: Bench, method: str, tmp_path: Path
) -> None:
    model, base = bench.load("llama", method), bench.plain("llama")
    names = model.set_trainable(trained_groups(method))
    packed = {n: p.clone() for n, p in model.base.named_parameters()}
    model.train()
    inputs = images(*WORDS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=text_labels(inputs)).loss
        loss.backward()
        assert all(model.get_parameter(name).grad is not None for name in names)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, packed[n]) for n, p in model.base.named_parameters())
    texts = batch(rows("t" * 9, "t" * 13), "left")
    assert torch.equal(logits_of(model, texts), logits_of(base, texts))
    model.eval()
    save_graft(model, tmp_path / "trained")
    options = {"quantization": "nf4", "dtype": "float32"}
    again = GraftedModel.from_pretrained(tmp_path / "trained", **options)
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))


def gradients(model: GraftedModel, method: str) -> dict[str, Tensor]:
    model.set_trainable(trained_groups(method))
    model.train()
    inputs = images(*WORDS)
    model(**inputs, labels=text_labels(inputs)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@every_method
def test_an_evaluation_does_not_cut_the_gradients(
    bench: Bench, method: str, checkpointing: bool
) -> None:
    """Bitsandbytes packs weights at the first forward without gradients, on CPUs that have bf16.

    Its kernel for packed weights has no backward pass: gradients were wrong by their own size. It
    rounds to bf16, so they agree to a few per cent with those of a model that was never asked.
    """
    untouched, asked = (perturb(bench.load("phi", method)) for _ in range(2))
    logits_of(asked, images(*WORDS))
    logits_of(asked, batch(rows("ttttttt")))
    if checkpointing:
        asked.gradient_checkpointing_enable()
    wanted, found = gradients(untouched, method), gradients(asked, method)
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() < 0.1 * wanted[name].norm(), name


@every_method
def test_only_the_base_is_quantised(bench: Bench, method: str) -> None:
    model = bench.grafted("llama", method)
    assert model.quantized
    for name in ("vision_tower", "workflows"):
        part = model.get_submodule(name)
        assert_unquantized(part, name)
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    with pytest.raises(UsageError, match=r"base\..*proj was quantised"):
        assert_unquantized(model.base, "base")
    linear = model.base.model.layers[0].mlp.up_proj
    assert type(linear).__name__ == "Linear4bit"
    assert linear.weight.quant_state.quant_type == "nf4"
    settings = model.base.config.quantization_config
    assert settings.bnb_4bit_use_double_quant
    assert not settings.llm_int8_enable_fp32_cpu_offload


def test_what_cannot_be_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bench.grafted("llama", "llava")
    with pytest.raises(UsageError, match="4-bit cannot be trained"):
        model.set_trainable(["base"])
    with pytest.raises(UsageError, match="quantization='nf4'"):
        GraftedModel.graft(bench.plain("llama"), None, CONFIGS["iaa-c"])
    with pytest.raises(UsageError, match="'int3' is not known; use nf4"):
        quantization_config("int3", torch.float32)
    assert quantization_config(None, torch.float32) is None
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UsageError, match=r"pip install 'mmgraft\[4bit\]'"):
            quantization_config("nf4", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UsageError, match="MPS"):
        quantization_config("nf4", torch.float32)


def test_a_graft_on_a_named_base_is_made_of_exact_tensors(bench: Bench) -> None:
    """An inserted layer is a copy of the file's layer, not of the rounded one in memory."""
    folder = str(bench.folder / "llama")
    tower = bench.tower
    model = GraftedModel.graft(folder, tower, CONFIGS["iaa-c"], quantization="nf4", dtype="float32")
    assert model.quantized
    exact = tiny_model("llama", **WIDE).model.layers[3].state_dict()
    copied = model.workflow().graft.layers[1].state_dict()
    assert all(torch.equal(tensor, exact[name]) for name, tensor in copied.items())


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux")
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_base_lets_go_of_its_file(tmp_path: Path, tied: bool) -> None:
    folder = save_base(tmp_path / "base", "llama", tie_word_embeddings=tied, **WIDE)
    base = load_base(resolve(str(folder)), torch.float32, {"": "cpu"}, "nf4")
    assert str(folder) not in Path("/proc/self/maps").read_text()
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    assert (embedding is head) == tied
    saved = tiny_model("llama", tie_word_embeddings=tied, **WIDE).get_input_embeddings().weight
    assert torch.equal(embedding, saved)
