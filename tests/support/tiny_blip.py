"""A tiny BLIP-2 checkpoint with random weights, as the Hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from tiny_towers import save_processor

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "layer_norm_eps": 1e-3,
    "initializer_range": 0.2,  # by default it is 1e-10
}
QFORMER: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "cross_attention_frequency": 3,
    "hidden_act": "relu",
    "layer_norm_eps": 1e-4,
    "initializer_range": 0.3,
}
TEXT: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 8,
    "ffn_dim": 8,
    "word_embed_proj_dim": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 11,
    "max_position_embeddings": 16,
}
QUERIES = 5


@torch.no_grad()
def tiny_blip(folder: Path, shards: str = "5GB") -> Blip2ForConditionalGeneration:
    """Write a checkpoint whose every parameter acts, its image processor beside it."""
    torch.manual_seed(3)
    config = Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config=TEXT, num_query_tokens=QUERIES
    )
    model = Blip2ForConditionalGeneration(config).eval()
    model.query_tokens.normal_()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "layernorm.weight", "LayerNorm.weight")):
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shards)
    save_processor(folder, VISION["image_size"], "BlipImageProcessor")
    return model
