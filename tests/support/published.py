"""Checkpoints as the published IAA and Wings code writes them, made from tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RANK, ROUTER_WIDTH = 2, 64


def published_iaa(base: Path, tower: Path | None, layers: list[int], grounding: bool = True):
    """Tensors and config of an IAA checkpoint on a tiny Llama; without a tower it names one."""
    tensors, config = _base(base)
    generator = torch.Generator().manual_seed(3)

    def noisy(tensor: Tensor) -> Tensor:
        return tensor + 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    tasks = [("", "model.mm_projector")]
    tasks += [("_grounding", "model.mm_projector_G")] * grounding
    embedding = tensors["model.embed_tokens.weight"]
    for tail, projector in tasks:
        for k, i in enumerate(layers):
            for name in [name for name in tensors if name.startswith(f"model.layers.{i}.")]:
                own = name.replace(f"model.layers.{i}.", f"model.condition_layers{tail}.{k}.")
                tensors[own] = noisy(tensors[name])
        tensors[f"model.embed_tokens_condition{tail}.weight"] = noisy(embedding)
        tensors[f"model.norm_condition{tail}.weight"] = noisy(tensors["model.norm.weight"])
        head = tensors.get("lm_head.weight", embedding)
        tensors[f"lm_head_condtion{tail}.weight"] = noisy(head)
        tensors |= _projector(projector, tower, embedding, generator)
    tensors |= _tower(tower)
    config |= {"model_type": "IAA", "ehce_layers": layers}
    return tensors, config


def published_wings(base: Path, tower: Path | None, routed: bool = True):
    """Tensors and config of a Wings checkpoint on a tiny Qwen2 or Llama."""
    tensors, config = _base(base)
    generator = torch.Generator().manual_seed(4)
    embedding = tensors["model.embed_tokens.weight"]
    hidden, dtype = embedding.shape[1], embedding.dtype

    def normal(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator).to(dtype)

    for i in range(config["num_hidden_layers"]):
        for learner in ("attn_pool", "attn_t_pool"):
            for part in "qkvo":
                name = f"model.layers.{i}.{learner}.{part}_proj"
                tensors[f"{name}.0.weight"] = normal(RANK, hidden)
                tensors[f"{name}.1.weight"] = normal(hidden, RANK)
        if routed:
            name = f"model.layers.{i}.reweight_module.linear"
            tensors |= {f"{name}.weight": normal(2, ROUTER_WIDTH), f"{name}.bias": normal(2)}
    tensors |= _projector("model.mm_projector", tower, embedding, generator)
    tensors |= _tower(tower)
    config |= {"model_type": "wings_qwen2", "system_prompt_length": 2, "image_token_length": 4}
    return tensors, config


def save_published(
    folder: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    tower: Path | None = None,
    kind: str = "safetensors",
    shards: int = 1,
) -> Path:
    """Write a checkpoint; with `tower` its config and image processor lie beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tower is not None:
        (folder / "vision_config.json").write_text((tower / "config.json").read_text())
        processor = "preprocessor_config.json"
        (folder / processor).write_text((tower / processor).read_text())
    names = sorted(tensors)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    places = {}
    for number in range(shards):
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{kind}"
        file = f"{stem}.{kind}" if shards == 1 else file
        places |= dict.fromkeys(part, file)
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def _base(base: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = json.loads((base / "config.json").read_text())
    for name in ("architectures", "dtype", "transformers_version"):
        config.pop(name, None)
    rope = config.pop("rope_parameters", {})
    config["rope_theta"] = rope.get("rope_theta", 10000.0)
    config |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    config["mm_vision_tower"] = "openai/tiny-clip"
    return load_file(base / "model.safetensors"), config


def _projector(
    name: str, tower: Path | None, embedding: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    hidden = embedding.shape[1]
    width = 16 if tower is None else json.loads((tower / "config.json").read_text())["hidden_size"]
    shapes = {"0.weight": (hidden, width), "0.bias": (hidden,)}
    shapes |= {"2.weight": (hidden, hidden), "2.bias": (hidden,)}
    return {
        f"{name}.{part}": 0.2 * torch.randn(shape, generator=generator).to(embedding.dtype)
        for part, shape in shapes.items()
    }


def _tower(tower: Path | None) -> dict[str, Tensor]:
    if tower is None:
        return {}
    prefix = "model.vision_tower.vision_tower.vision_model."
    return {
        prefix + name.removeprefix("vision_model."): tensor
        for name, tensor in load_file(tower / "model.safetensors").items()
    }
