"""Random models of SmolLM2-135M's shape, and the same computation as transformers' own Llava.

Weights are drawn small enough for every activation to stay finite; speed and memory do not depend
on them. The Llava's weights are the grafted model's own tensors (or copies, where they are to be
trained), and its tower hands on the features that it is given, as ours does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from mmgraft.model.modeling import GraftedModel

SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
VOCAB, LARGE_VOCAB = 49152, 151936
IMAGE_TOKENS = 576
PLACES = {1: [22], 2: [14, 22], 4: [7, 14, 22, 29], 8: [3, 7, 11, 14, 18, 22, 25, 29]}
"""Insertion points by their number, as in recipes/comparisons/iaa-layers.yaml."""


def base(vocab: int = VOCAB, **values: Any) -> LlamaForCausalLM:
    """A random base in fp32; `values` change its shape."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab, **{**SHAPE, **values})
    return LlamaForCausalLM(config).eval()


def places(inserted: int, layers: int = 30) -> list[int]:
    """Return insertion points of `inserted` layers, in a base cut to fewer layers too."""
    return [place for place in PLACES[inserted] if place < layers] or [0]


def grafted(base: LlamaForCausalLM, config: Any) -> GraftedModel:
    """A fresh graft on the base, given features of the base's own width."""
    return GraftedModel.graft(base, None, config)


def llava(model: GraftedModel, copy: bool = False) -> LlavaForConditionalGeneration:
    """Transformers' Llava that computes what the grafted model does for rows with an image.

    Args:
        model: With LLaVA's method, or IAA's structure `c`.
        copy: Tensors of its own.
    """
    text, graft = model.base.config.to_dict(), model.workflow().graft
    inserted = list(getattr(graft, "layers", []))
    places = list(getattr(graft, "layer_indices", []))
    text["num_hidden_layers"] += len(inserted)
    text["layer_types"] = None
    tied = graft.embedding is graft.head is None or getattr(graft, "tied", False)
    text["tie_word_embeddings"] = bool(tied)
    vision = CLIPVisionConfig(
        hidden_size=text["hidden_size"], intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, image_size=8, patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**text), image_token_index=image_token(model),
        vision_feature_layer=-1, vision_feature_select_strategy="full",
        tie_word_embeddings=bool(tied),
    )  # fmt: skip
    with torch.device("meta"):
        made = LlavaForConditionalGeneration(config)
    made.model.vision_tower = Given()
    rotary = model.base.model.rotary_emb
    made.model.language_model.rotary_emb = type(rotary)(config.text_config)
    tensors = _tensors(model, inserted, places)
    if copy:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if tied:
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    made.load_state_dict(tensors, assign=True)
    if tied:
        made.tie_weights()
    made.generation_config = model.base.generation_config
    return made.requires_grad_(False).eval()


def _tensors(
    model: GraftedModel, inserted: list[nn.Module], places: list[int]
) -> dict[str, Tensor]:
    base, graft = model.base, model.workflow().graft
    stack: list[nn.Module] = []
    for index, layer in enumerate(base.model.layers):
        stack.append(layer)
        if index in places:
            stack.append(inserted[places.index(index)])
    text = "model.language_model."
    parts: dict[str, nn.Module] = {
        f"{text}layers.{number}.": layer for number, layer in enumerate(stack)
    }
    parts[f"{text}embed_tokens."] = graft.embedding or base.get_input_embeddings()
    parts[f"{text}norm."] = graft.norm or base.model.norm
    parts["lm_head."] = graft.head or base.lm_head
    parts["model.multi_modal_projector.linear_1."] = model.workflow().projector.mlp[0]
    parts["model.multi_modal_projector.linear_2."] = model.workflow().projector.mlp[2]
    return {
        prefix + name: tensor
        for prefix, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


class Given(nn.Module):
    """A tower whose pixels are the features."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Features as the only hidden state."""
        return BaseModelOutputWithPooling(
            last_hidden_state=pixel_values, hidden_states=(pixel_values,)
        )


def image_token(model: GraftedModel) -> int:
    """The id at image positions."""
    return model.workflow().record.image_token.id


def conversation(
    model: GraftedModel,
    rows: int,
    before: int = 16,
    answer: int = 64,
    image_tokens: int = IMAGE_TOKENS,
) -> dict[str, Tensor]:
    """Rows of an image, a question of `before` ids and `answer` supervised ids, as ours takes them.

    The image stands first, as in LLaVA's captions.
    """
    draw = torch.Generator().manual_seed(0)
    length, token = image_tokens + before + answer, image_token(model)
    ids = torch.randint(3, min(20_000, token), (rows, length), generator=draw)
    kinds = torch.zeros_like(ids)
    kinds[:, :image_tokens] = 1
    ids[:, :image_tokens] = token
    labels = ids.clone()
    labels[:, : length - answer] = -100
    features = torch.randn(rows, image_tokens, SHAPE["hidden_size"], generator=draw)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "mm_token_type_ids": kinds,
        "image_features": features,
    }


def for_llava(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch as transformers' Llava takes it."""
    kept = {k: v for k, v in batch.items() if k not in ("mm_token_type_ids", "image_features")}
    return {**kept, "pixel_values": batch["image_features"]}
