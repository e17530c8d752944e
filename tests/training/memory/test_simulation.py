"""A step with shapes alone, against explicit counts and against the same step in earnest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from grafting import graft_on
from mmgraft import (
    ExpertConfig,
    IAAConfig,
    LlavaConfig,
    LoraConfig,
    WingsConfig,
    XattnConfig,
)
from mmgraft.errors import MMGraftError
from mmgraft.model import loss
from mmgraft.model.kernels import activations
from mmgraft.recipes.recipe import Stage
from mmgraft.training.memory.simulation import Load, Step, meta_model, simulate
from mmgraft.training.stages import open_stage
from mmgraft.vision.plan import Plan
from tiny import HIDDEN, LAYERS, tiny_config
from tiny_records import tiny_record

PATCHES, LENGTH, LEARNED = 4, 40, 12
CONFIGS = {
    "iaa": IAAConfig(layers=[0, 3]),
    "wings": WingsConfig(rank=4),
    "llava": LlavaConfig(),
    "lora": LoraConfig(rank=4),
    "lora-token": LoraConfig(rank=3, gate="token", targets="feedforward"),
    "expert": ExpertConfig(layers=[0, 3]),
    "xattn": XattnConfig(layers=[0, 2]),
}


def step(method: str, arch: str = "llama", **changes) -> Step:
    """One step of two equal rows in fp32 of everything that a method trains."""
    base = changes.pop("base", {})
    model = meta_model(
        tiny_record(**CONFIGS[method].model_dump(mode="json")),
        tiny_config(arch, **base),
        HIDDEN,
        torch.float32,
        changes.pop("quantization", None),
    )
    open_stage(model, stage(method))
    plans, padded = (Plan.of_count(PATCHES),), changes.pop("padded", False)
    options = {"precision": "fp32", "device": "cpu", **changes}
    model.train()
    load = Load(2, LENGTH, plans, LEARNED, padded, HIDDEN, torch.float32, **options)
    return simulate(model, load)


def gradients(method: str) -> int:
    """Bytes of the gradients of what a method trains."""
    record = tiny_record(**CONFIGS[method].model_dump(mode="json"))
    model = meta_model(record, tiny_config("llama"), HIDDEN, torch.float32)
    open_stage(model, stage(method))
    return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def stage(method: str) -> Stage:
    train = ["projector"] if method == "llava" else ["projector", "graft"]
    return Stage(name="only", train=train, lr=1.0, workflow="mm")


def earnest(method: str, monkeypatch: pytest.MonkeyPatch, padded: bool = False) -> int:
    """Bytes that autograd saves in the same step computed in earnest, parameters left out."""
    model = graft_on("llama", CONFIGS[method])
    open_stage(model, stage(method))
    model.train()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    inner = activations._Made.pack

    def inside(made: activations._Made, tensor: torch.Tensor) -> Any:
        """In decoder layers, where what activations gave is made again from what they got."""
        kept = inner(made, tensor)
        pack(kept if isinstance(kept, torch.Tensor) else kept.given)
        return kept

    monkeypatch.setattr(activations._Made, "pack", inside)
    monkeypatch.setattr(activations, "_is_handled", lambda: False)
    kinds = torch.zeros(2, LENGTH, dtype=torch.long)
    kinds[:, : model.workflow().positions(Plan.of_count(PATCHES))] = 1
    labels = torch.full((2, LENGTH), -100)
    labels[:, LENGTH - LEARNED :] = 0
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[1, LENGTH - padded :] = 0
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(
            input_ids=torch.zeros(2, LENGTH, dtype=torch.long),
            attention_mask=real,
            mm_token_type_ids=kinds,
            labels=labels,
            image_features=torch.zeros(2, PATCHES, HIDDEN),
            workflow="mm",
        )
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("method", CONFIGS)
def test_what_is_kept_is_what_autograd_saves_in_earnest(method, monkeypatch):
    counted, real = step(method).kept, earnest(method, monkeypatch)
    assert counted == pytest.approx(real, rel=0.1)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return what torch's attention is called with: shapes of queries and keys, causal, masked."""
    calls: list[tuple[Any, ...]] = []
    original = F.scaled_dot_product_attention

    def attend(query, key, *args, attn_mask=None, is_causal=False, **options):
        calls.append((tuple(query.shape), tuple(key.shape), is_causal, attn_mask is not None))
        return original(query, key, *args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    return calls


@pytest.mark.parametrize("padded", [False, True])
def test_long_rows_of_wings_take_the_path_that_the_training_takes(padded, attended, monkeypatch):
    monkeypatch.setitem(globals(), "LENGTH", 120)
    monkeypatch.setitem(globals(), "PATCHES", 40)
    counted = step("wings", padded=padded).kept
    simulated = list(attended)
    attended.clear()
    real = earnest("wings", monkeypatch, padded)
    assert simulated == attended
    assert {query[0] for query, *_ in simulated} == {2}  # all rows in one call
    assert counted == pytest.approx(real, rel=0.05)


def test_on_cuda_long_rows_are_read_with_masks_all_together(attended, monkeypatch):
    monkeypatch.setitem(globals(), "LENGTH", 120)
    monkeypatch.setitem(globals(), "PATCHES", 40)
    step("wings", padded=True, device="cuda")
    assert {query[0] for query, *_ in attended} == {2}
    assert all(masked for *_, masked in attended)


@pytest.mark.parametrize("method", CONFIGS)
def test_with_checkpointing_a_layer_keeps_its_output_alone(method):
    plain, light = step(method), step(method, checkpointing=True)
    state = 2 * LENGTH * HIDDEN * 4
    assert len(plain.layers) == len(light.layers) == LAYERS
    masks_of_all = 1 if method == "wings" else 0  # the first layer makes them
    assert all(kept <= 2 * state for kept in light.layers[masks_of_all:])
    *layers, last = plain.layers
    assert min(layers) > 8 * state
    assert last > 4 * state  # it feeds forward only what the loss reads
    assert light.peak < plain.peak


def test_an_inserted_layer_counts_with_the_layer_before_it():
    layers = step("iaa").layers
    assert 2 * layers[1] < layers[0] < 3 * layers[1]  # it is trained, so it keeps its inputs too
    assert layers[1] == layers[2]


def test_gradients_that_add_up_are_there_all_the_time():
    once, adding = step("iaa"), step("iaa", accumulates=True)
    assert adding.kept - once.kept == gradients("iaa")


def test_logits_grow_what_is_kept_by_a_chunk_and_no_more(monkeypatch):
    """The last chunk's logits wait for the backward pass."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 5000)
    grown = step("llava", base={"vocab_size": 5000}).kept - step("llava").kept
    assert abs(grown) <= 5000 * 4


def test_a_padding_mask_costs_a_square_of_the_length_a_layer():
    plain, padded = step("llava"), step("llava", padded=True)
    square = 2 * LENGTH * LENGTH * 4
    assert padded.kept - plain.kept >= LAYERS * square


def test_a_4bit_base_trains_its_graft_through_layers_without_values():
    assert step("iaa", quantization="nf4").peak > gradients("iaa")


@pytest.mark.parametrize("arch", ["gemma2", "gpt_oss", "bloom", "opt", "qwen3_moe"])
@pytest.mark.parametrize("method", ["iaa", "wings"])
def test_other_architectures_run_without_values(arch, method):
    found = step(method, arch)
    assert found.peak > found.kept > sum(found.layers) > 0


def test_a_base_that_asks_for_values_is_refused_by_name(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x):
        return self.down_proj(self.up_proj(x)) * float(x.detach().sum())

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(MMGraftError, match="LlamaForCausalLM cannot be estimated"):
        step("llava")


def test_gradients_that_leave_are_not_held_to_the_end(monkeypatch):
    """In rows so short that gradients are what a step holds most of."""
    monkeypatch.setitem(globals(), "LENGTH", 6)
    monkeypatch.setitem(globals(), "LEARNED", 1)
    held, leaving = step("iaa"), step("iaa", gradients_leave=True)
    assert leaving.kept == held.kept
    assert leaving.peak < gradients("iaa") <= held.peak


@pytest.mark.parametrize(("arch", "more"), [("llama", 1.0), ("gpt2", 1.3), ("phi", 1.2)])
def test_on_cuda_autocast_keeps_what_its_own_lists_widen(arch: str, more: float) -> None:
    """Norms and the power in gelu_new are computed in fp32 there; Llama's norm casts by itself."""
    kept = {d: step("llava", arch, device=d, precision="bf16").kept for d in ("cpu", "cuda")}
    ratio = kept["cuda"] / kept["cpu"]
    assert ratio == 1.0 if more == 1.0 else more < ratio < 2
