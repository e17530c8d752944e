"""One case of `cuda.py`: a grafted model, or transformers' Llava of the same modules, measured.

The case runs in a process of its own, so that its memory is its own. The Llava is made of the
grafted model's own layers, in bf16 or in 4-bit, so both compute with the same weights; what trains
in one trains in the other. Nothing is read from pictures: image features are given.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import Given, for_llava, image_token
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmgraft.errors import is_out_of_memory
from mmgraft.model.modeling import GraftedModel

PUBLISHED = [0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31]
"""Layers that the paper's 14 inserted layers follow."""


@dataclass(frozen=True)
class Case:
    """Subject of a case: a method, or the Llava beside it."""

    name: str
    method: str  # llava, iaa or wings
    inserted: int = 0
    stock: bool = False


CASES = (
    Case("LLaVA, projector", "llava"),
    *(Case(f"IAA, {count} layers", "iaa", count) for count in (2, 8, 14)),
    Case("Wings, r 64", "wings"),
    *(Case(f"transformers' Llava, N + {count}", "iaa", count, True) for count in (2, 8, 14)),
    Case("transformers' Llava, N", "llava", 0, True),
)
"""Every grafted case and the Llava of the same depth; Wings stands beside the Llava of depth N."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a case: positions of an image, of the question and the answer, and so on."""

    image: int = 576
    before: int = 64
    answer: int = 128
    batch: int = 4
    steps: int = 5
    new_tokens: int = 128
    decode_batches: tuple[int, ...] = (1, 8)
    largest: int = 512
    checkpointing: bool = False
    device: str = "cuda"

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.image + self.before + self.answer


@dataclass
class Built:
    """A model ready to be measured, and what it takes to say how much it computes."""

    model: Any
    stock: bool
    token: int
    trained: list[nn.Parameter]
    sizes: Sizes
    width: int
    layer_parameters: int
    layers: int
    vocab: int
    graft_parameters: int
    weights: int = 0


def places(count: int, layers: int) -> list[int]:
    """Layers after which so many are inserted: the published ones for 14 of 32, else spread."""
    if count == len(PUBLISHED) and layers == 32:
        return PUBLISHED
    count = min(count, layers)
    return sorted({round((at + 1) * layers / count) - 1 for at in range(count)})


def config(case: Case, layers: int, rank: int = 64) -> Any:
    """The method's settings. Embedding and head are the base's, so that the Llava has as many."""
    from mmgraft import IAAConfig, LlavaConfig, WingsConfig

    if case.method == "iaa":
        return IAAConfig(layers=places(case.inserted, layers), embedding=False, head=False)
    return WingsConfig(rank=rank) if case.method == "wings" else LlavaConfig()


def build(case: Case, base: Path, quantization: str | None, sizes: Sizes, rank: int = 64) -> Built:
    """Load the base as `mmgraft train` does, graft it, and open the graft for training."""
    base_config = LlamaConfig.from_pretrained(base)
    model = GraftedModel.graft(
        str(base),
        None,
        config(case, base_config.num_hidden_layers, rank),
        dtype="bfloat16",
        quantization=quantization,
        device_map={"": sizes.device},
    )
    groups = ["projector"] if case.method == "llava" else ["projector", "graft"]
    model.set_trainable(groups)
    graft = model.workflow().graft
    inserted = len(list(graft.layers)) if case.method == "iaa" else 0
    token, trained = image_token(model), [p for p in model.parameters() if p.requires_grad]
    built = Built(
        model=stock(model) if case.stock else model,
        stock=case.stock,
        token=token,
        trained=trained,
        sizes=sizes,
        width=base_config.hidden_size,
        layer_parameters=_layer_parameters(base_config),
        layers=base_config.num_hidden_layers + inserted,
        vocab=base_config.vocab_size,
        graft_parameters=sum(p.numel() for p in graft.parameters()) if not inserted else 0,
    )
    if sizes.checkpointing:
        built.model.gradient_checkpointing_enable()
    del model, graft
    gc.collect()
    built.weights = _allocated(sizes.device)
    return built


def _layer_parameters(base_config: LlamaConfig) -> int:
    from mmgraft.anatomy import decoder_layers, examine, skeleton

    empty = skeleton(base_config)
    return sum(p.numel() for p in decoder_layers(empty, examine(empty))[0].parameters())


def stock(model: GraftedModel) -> LlavaForConditionalGeneration:
    """Transformers' Llava that is made of a grafted model's own modules; that one is used up."""
    base: Any = model.base
    workflow = model.workflow()
    graft: Any = workflow.graft
    after = dict(
        zip(getattr(graft, "layer_indices", []), getattr(graft, "layers", []), strict=True)
    )
    stack: list[Any] = []
    for index, layer in enumerate(base.model.layers):
        stack += [layer, after[index]] if index in after else [layer]
    for slot, layer in enumerate(stack):
        layer.self_attn.layer_idx = slot
    text = base.config.to_dict()
    text |= {"num_hidden_layers": len(stack), "layer_types": None}
    text.pop("quantization_config", None)
    vision = CLIPVisionConfig(
        hidden_size=text["hidden_size"], intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, image_size=8, patch_size=8,
    )  # fmt: skip
    kind = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text),
        image_token_index=image_token(model),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    kind._attn_implementation = base.config._attn_implementation
    with torch.device("meta"):
        made = LlavaForConditionalGeneration(kind)
    reader: Any = made.model.language_model
    reader.layers = nn.ModuleList(stack)
    reader.embed_tokens = graft.embedding or base.get_input_embeddings()
    reader.norm = graft.norm or base.model.norm
    reader.rotary_emb = base.model.rotary_emb
    made.lm_head = graft.head or base.get_output_embeddings()
    made.model.vision_tower = Given()  # type: ignore[assignment]
    projector: Any = made.model.multi_modal_projector
    projector.linear_1, projector.linear_2 = workflow.projector.mlp[0], workflow.projector.mlp[2]
    made.generation_config = base.generation_config
    return made


# -- what is computed -----------------------------------------------------------------------------


def rows(built: Built, count: int, prompt: bool = False) -> dict[str, Any]:
    """A batch of `count` rows on the device: an image, a question and, unless `prompt`, an answer.

    Returns:
        What the model's forward takes; ids ``(count, s)``, features ``(count, P, width)``.
    """
    sizes, draw = built.sizes, torch.Generator().manual_seed(0)
    length = sizes.image + sizes.before + (0 if prompt else sizes.answer)
    ids = torch.randint(min(20_000, built.vocab) - 1, (count, length), generator=draw)
    ids += ids >= built.token  # any but the image's
    ids[:, : sizes.image] = built.token
    kinds = torch.zeros_like(ids)
    kinds[:, : sizes.image] = 1
    features = torch.randn(count, sizes.image, built.width, generator=draw)
    batch: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "image_features": features.to(torch.bfloat16),
    }
    if not prompt:
        batch["labels"] = ids.clone()
        batch["labels"][:, : length - sizes.answer] = -100
    if built.stock:
        batch = for_llava(batch)
    moved: dict[str, Any] = {name: t.to(sizes.device) for name, t in batch.items()}
    return moved if built.stock else {**moved, "workflow": "mm"}


def train_step(built: Built, count: int) -> Callable[[], None]:
    """A step of AdamW on `count` rows under bf16 autocast, as a recipe's stage does it."""
    built.model.train()
    optimizer = torch.optim.AdamW(built.trained, lr=1e-5, fused=built.sizes.device == "cuda")
    batch = rows(built, count)

    def step() -> None:
        with torch.autocast(built.sizes.device, dtype=torch.bfloat16):
            loss = built.model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def flops(built: Built, count: int) -> float:
    """Operations of the model in a training step on `count` rows, nothing computed twice.

    A frozen weight takes 2 a position forwards and 2 for the gradient that passes it; a trained one
    2 more. Attention is causal. The head counts at supervised positions, for the Llava too.
    """
    sizes = built.sizes
    positions = count * sizes.length
    trained = sum(p.numel() for p in built.trained)
    body = 4.0 * built.layers * built.layer_parameters + 4.0 * built.graft_parameters
    attention = 6.0 * sizes.length * built.width * built.layers
    head = 4.0 * built.vocab * built.width * count * sizes.answer
    return positions * (body + 2.0 * trained + attention) + head


# -- measuring ------------------------------------------------------------------------------------


def training(built: Built, peak_flops: float | None) -> dict[str, Any]:
    """Peak memory, tokens a second and model FLOP utilisation of a step."""
    sizes = built.sizes
    step = train_step(built, sizes.batch)
    for _ in range(2):
        step()
    _reset_peak(sizes.device)
    seconds = []
    for _ in range(sizes.steps):
        start = _now(sizes.device)
        step()
        seconds.append(_now(sizes.device) - start)
    took = statistics.median(seconds)
    done = flops(built, sizes.batch) / took
    return {
        "peak": _peak(sizes.device),
        "seconds": seconds,
        "tokens_per_second": sizes.batch * sizes.length / took,
        "tflops": done / 1e12,
        "mfu": None if peak_flops is None else done / peak_flops,
    }


def largest_batch(built: Built) -> int:
    """Most rows in a step that the device's memory holds, up to `Sizes.largest`."""
    fits, fails = 0, built.sizes.largest + 1
    count = 1
    while fits + 1 < fails:
        if _holds(built, count):
            fits = count
        else:
            fails = count
        count = min(2 * fits, fails - 1) if fails > built.sizes.largest else (fits + fails) // 2
        count = max(count, fits + 1)
    return fits


def _holds(built: Built, count: int) -> bool:
    try:
        step = train_step(built, count)
        for _ in range(2):
            step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    else:
        return True
    finally:
        step = None  # type: ignore[assignment]
        for parameter in built.trained:
            parameter.grad = None
        _forget(built.sizes.device)


def decoding(built: Built) -> dict[str, Any]:
    """Tokens a second of all rows together, prefill not counted, for each batch size."""
    built.model.eval()
    for parameter in built.trained:
        parameter.data = parameter.data.to(torch.bfloat16)
    found: dict[str, Any] = {}
    for count in built.sizes.decode_batches:
        batch = rows(built, count, prompt=True)
        few, many = 2, built.sizes.new_tokens
        _generate(built, batch, many)  # every length of keys once: cuDNN builds a graph for each
        _reset_peak(built.sizes.device)
        took = {}
        for length in (few, many):
            start = _now(built.sizes.device)
            _generate(built, batch, length)
            took[length] = _now(built.sizes.device) - start
        speed = count * (many - few) / max(took[many] - took[few], 1e-9)
        found[str(count)] = {
            "tokens_per_second": speed,
            "first": took[few],
            "peak": _peak(built.sizes.device),
        }
    return found


def _generate(built: Built, batch: dict[str, Any], length: int) -> None:
    out = built.model.generate(
        **batch,
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
    )
    assert out.shape[1] == batch["input_ids"].shape[1] + length


def measure(built: Built, peak_flops: float | None, largest: bool) -> dict[str, Any]:
    """Everything of one case; a part that does not fit says so."""
    report: dict[str, Any] = {"weights": built.weights, "flops": flops(built, built.sizes.batch)}
    parts: dict[str, Callable[[], Any]] = {"training": lambda: training(built, peak_flops)}
    if largest:
        parts["largest_batch"] = lambda: largest_batch(built)
    parts["decoding"] = lambda: decoding(built)  # last: it leaves the trained weights in bf16
    for name, work in parts.items():
        try:
            report[name] = work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            report[name] = None
        _forget(built.sizes.device)
    return report


def _forget(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0
