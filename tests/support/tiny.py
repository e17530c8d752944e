"""Tiny random causal LMs of every architecture that mmgraft promises to graft.

The sizes are as small as the classes allow, the values are large enough for a mistake to show:
multipliers differ from 1, sliding windows are shorter than the prompts, norms and biases are not
at their initial values, and heads, KV heads and head sizes differ from one another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from tiny_tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, tiny_tokenizer

if TYPE_CHECKING:
    from mmgraft.vision.towers.base import VisionTower

HIDDEN = 32
LAYERS = 4
HEADS = 4
WINDOW = 8


@dataclass(frozen=True)
class TinyArch:
    """One row of the test matrix: the model type of transformers and what differs from default."""

    model_type: str
    values: dict[str, Any] = field(default_factory=dict)


def _sizes(kv_heads: int | None = 2, intermediate: int = 48, **values: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": intermediate,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
    }
    return {**{k: v for k, v in sizes.items() if v is not None}, **values}


def _rope(theta: float, **values: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **values}


_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SLIDING_FULL = ["sliding_attention", "full_attention"] * (LAYERS // 2)

# Gemma 3 and gpt-oss hold the odd one out in another place than their default pattern would.
_GEMMA3_TYPES = [
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "sliding_attention",
]

ARCHITECTURES: dict[str, TinyArch] = {
    "llama": TinyArch("llama", _sizes(rope_parameters=_rope(500.0))),
    "qwen2": TinyArch("qwen2", _sizes(tie_word_embeddings=True)),
    "qwen3": TinyArch("qwen3", _sizes(head_dim=12)),
    "qwen3_moe": TinyArch(
        "qwen3_moe",
        _sizes(head_dim=12, moe_intermediate_size=24, norm_topk_prob=True, **_MOE),
    ),
    "mistral": TinyArch("mistral", _sizes(kv_heads=1, sliding_window=None)),
    "mixtral": TinyArch("mixtral", _sizes(intermediate=24, **_MOE)),
    "gemma2": TinyArch(
        "gemma2",
        _sizes(
            head_dim=12,
            sliding_window=WINDOW,
            layer_types=_SLIDING_FULL,
            query_pre_attn_scalar=12,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3": TinyArch(
        "gemma3_text",
        _sizes(
            head_dim=12,
            sliding_window=WINDOW,
            layer_types=_GEMMA3_TYPES,
            query_pre_attn_scalar=12,
            rope_parameters={
                "sliding_attention": _rope(100.0),
                "full_attention": _rope(10000.0),
            },
        ),
    ),
    "phi": TinyArch("phi", _sizes(rope_parameters=_rope(1000.0, partial_rotary_factor=0.5))),
    "phi3": TinyArch("phi3", _sizes()),
    "gpt2": TinyArch(
        "gpt2",
        {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128},
    ),
    "gpt_neox": TinyArch(
        "gpt_neox",
        _sizes(kv_heads=None, rope_parameters=_rope(1000.0, partial_rotary_factor=0.5)),
    ),
    "opt": TinyArch(
        "opt",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 128,
        },
    ),
    "bloom": TinyArch("bloom", {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}),
    "falcon": TinyArch(
        "falcon",
        {
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 128,
        },
    ),
    "olmo2": TinyArch("olmo2", _sizes()),
    "stablelm": TinyArch(
        "stablelm",
        _sizes(
            use_qkv_bias=True,
            use_parallel_residual=True,
            rope_parameters=_rope(1000.0, partial_rotary_factor=0.5),
        ),
    ),
    "cohere": TinyArch("cohere", _sizes(logit_scale=0.4)),
    "granite": TinyArch(
        "granite",
        _sizes(
            embedding_multiplier=3.0,
            residual_multiplier=0.6,
            attention_multiplier=0.5,
            logits_scaling=1.5,
        ),
    ),
    "smollm3": TinyArch(
        "smollm3",
        _sizes(no_rope_layers=[1, 0, 1, 0], layer_types=["full_attention"] * LAYERS),
    ),
    "glm": TinyArch("glm", _sizes(head_dim=8)),
    "starcoder2": TinyArch("starcoder2", _sizes(tie_word_embeddings=False)),
    "gpt_oss": TinyArch(
        "gpt_oss",
        _sizes(
            head_dim=16,
            sliding_window=WINDOW,
            layer_types=_SLIDING_FULL,
            rope_parameters=_rope(1000.0),
            **_MOE,
        ),
    ),
}
"""The 23 rows of the matrix, by the name that tests use."""

_FALCON = ARCHITECTURES["falcon"].values
_OPT = ARCHITECTURES["opt"].values

VARIANTS: dict[str, TinyArch] = {
    "qwen2_sliding": TinyArch(
        "qwen2",
        _sizes(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    ),
    "mistral_sliding": TinyArch("mistral", _sizes(sliding_window=WINDOW)),
    "smollm3_sliding": TinyArch(
        "smollm3",
        _sizes(no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=WINDOW),
    ),
    "phi_qk_norm": TinyArch("phi", _sizes(qk_layernorm=True)),
    "gpt_neox_sequential": TinyArch("gpt_neox", _sizes(kv_heads=None, use_parallel_residual=False)),
    "stablelm_sequential": TinyArch("stablelm", _sizes(qk_layernorm=True)),
    "opt_post_norm": TinyArch(
        "opt", {**_OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False}
    ),
    "falcon_sequential": TinyArch("falcon", {**_FALCON, "parallel_attn": False, "bias": True}),
    "falcon_new": TinyArch(
        "falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "falcon_alibi": TinyArch("falcon", {**_FALCON, "alibi": True}),
    "cohere_qk_norm": TinyArch("cohere", _sizes(use_qk_norm=True, logit_scale=0.4)),
    "qwen2_moe": TinyArch(
        "qwen2_moe",
        _sizes(moe_intermediate_size=24, shared_expert_intermediate_size=20, **_MOE),
    ),
    "qwen3_moe_mixed": TinyArch(
        "qwen3_moe",
        _sizes(head_dim=12, moe_intermediate_size=24, mlp_only_layers=[0, 2], **_MOE),
    ),
}
"""Other forms of the same classes, for tests of what depends on the form."""


def tiny_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """Gives the configuration of a row of ARCHITECTURES or VARIANTS, changed by `overrides`."""
    arch = ARCHITECTURES.get(name) or VARIANTS[name]
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    values = {"vocab_size": VOCAB_SIZE, **ids, **arch.values, **overrides}
    return CONFIG_MAPPING[arch.model_type](**values)


_TABLES = (
    "embeddings.weight",
    "head.weight",
    "embed_out.weight",
    "wte.weight",
    "wpe.weight",
    "embed_tokens.weight",
    "embed_positions.weight",
    "embed_in.weight",
)


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws every parameter anew, in order of name; norm weights stay near their initial value.

    Large enough that four layers change the state visibly, small enough that fp32 stays exact to
    1e-6 of the logits' own size.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2 or "norm" in name:
            # A scale's own initial value (0 in Gemma, 1 elsewhere) is kept as its centre.
            centre = parameter.round().clamp(0, 1) if name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * noise)
        elif name.endswith(_TABLES):
            parameter.copy_(0.25 * noise)
        else:
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))


def tiny_model(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Builds a random causal LM in eval mode: the same weights for the same name and seed."""
    config = tiny_config(name, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    # As from_pretrained does it: rotary tables and other buffers stay in fp32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def save_base(
    folder: Path | str,
    name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    chat_template: bool = True,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Writes a base folder as the Hub has it: config, safetensors, and a tokenizer if asked."""
    folder = Path(folder)
    tiny_model(name, seed, dtype, **overrides).save_pretrained(
        folder, max_shard_size=max_shard_size
    )
    if tokenizer:
        tiny_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder


def tiny_tower(patches: int = 4, hidden: int = 16, seed: int = 0) -> VisionTower:
    """Builds a vision tower with random weights. See tiny_towers for every other one."""
    from tiny_towers import tiny_tower as build

    return build(patches, hidden, seed)


def tiny_clip_dir(folder: Path | str, image_size: int = 16) -> Path:
    """Writes a CLIP vision model (patches of 8 pixels, hidden 16) with its image processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    crop = {"height": image_size, "width": image_size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=crop)
    return _save_tower(folder, "clip", image_size, processor)


def tiny_siglip_dir(folder: Path | str, image_size: int = 16) -> Path:
    """Writes a SigLIP vision model (patches of 8 pixels, hidden 16) with its image processor."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    return _save_tower(folder, "siglip", image_size, processor)


def _save_tower(folder: Path | str, name: str, image_size: int, processor: Any) -> Path:
    from tiny_towers import tiny_vision_model

    tiny_vision_model(name, image_size=image_size).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
