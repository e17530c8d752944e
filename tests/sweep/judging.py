"""One type of causal LM with every method: from its default configuration to a verdict.

A base is built small and random and saved; then everything goes as for a user: `inspect`, a graft
from the files, loading, and the invariants on the loaded graft.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from invariants import Case, broken
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from grafting import perturb, takes
from mmgraft import (
    ExpertConfig,
    GraftedModel,
    IAAConfig,
    LlavaConfig,
    LoraConfig,
    WingsConfig,
    XattnConfig,
)
from mmgraft.anatomy import shrunken, text_config
from mmgraft.basefiles import ModelFiles
from mmgraft.errors import UsageError
from mmgraft.model import modeling
from mmgraft.model.files import create
from mmgraft.model.files.graft_file import TemplateChoice
from mmgraft.model.files.summary import ModelSummary, summarise_model
from mmgraft.vision.spec import VisionSpec
from mmgraft.vision.towers.registry import describe_tower, load_tower
from tiny import randomise

METHODS = ("iaa", "wings", "llava", "lora", "expert", "xattn")
TOWER_WIDTH = 16

INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3, 9, 18, 27]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "falcon_h1": {"mamba_n_heads": 16},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "xmod": {"default_language": "en_XX"},
}
"""Values that a default configuration lacks to be built, or needs to show its layers when small."""


def small_config(kind: str) -> PreTrainedConfig:
    """Return the smallest configuration of a type that still has each of its kinds of layers."""
    return shrunken(CONFIG_MAPPING[kind](**OVERRIDES.get(kind, {})))


def small_base(kind: str, seed: int = 0) -> PreTrainedModel:
    """Build a random base of a type; the same weights for the same type and seed.

    Of a type whose text has a class of its own, the whole model, as it is published.
    """
    torch.manual_seed(seed)
    config = small_config(kind)
    alone = text_config(config) is config
    auto = AutoModelForCausalLM if alone else AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed)
    return model


def share_tower(tower: Path) -> None:
    """Load the tower once for all types: it is not what is judged."""
    spec = VisionSpec(id=str(tower))
    loaded, shape = load_tower(spec), describe_tower(spec)
    modeling.load_tower = lambda *_, **__: loaded
    create.describe_tower = lambda _: shape


def judge(kind: str, tower: Path, folder: Path, methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """Return the verdict on every method: works, refused with the reason, or fails with what.

    What fails is judged again with other weights: rounding sends a token to another expert, or out
    of a selection, once in a while.
    """
    started = time.monotonic()
    verdicts: dict[str, dict[str, str]] = {}
    for seed in (0, 1):
        wanted = [name for name in methods if "fails" in verdicts.get(name, {"fails": ""})]
        verdicts |= judge_once(kind, tower, folder / str(seed), wanted, seed) if wanted else {}
    for found in verdicts.values():
        for word, reason in found.items():
            found[word] = re.sub(rf"{re.escape(str(folder))}/\d/base", "the base", reason)
    return {"type": kind, "seconds": round(time.monotonic() - started, 1), **verdicts}


def judge_once(
    kind: str, tower: Path, folder: Path, methods: list[str], seed: int
) -> dict[str, dict[str, str]]:
    try:
        small_base(kind, seed).save_pretrained(folder / "base")
        base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    except Exception as error:  # transformers itself cannot build, save or load it
        return dict.fromkeys(methods, unbuilt(kind, folder / "base", failure(error)))
    return judge_methods(kind, base, tower, folder, methods)


def unbuilt(kind: str, folder: Path, why: str) -> dict[str, str]:
    """Return what `inspect` says of a type that cannot be built small."""
    try:
        summary(folder, kind)
    except UsageError as refusal:
        return {"refused": str(refusal)}
    except Exception as error:
        return {"fails": f"inspect: {failure(error)}"}
    return {"unbuilt": why}


def summary(folder: Path, kind: str) -> ModelSummary:
    """Return what `inspect` says of a base; of one that was not saved, by its configuration."""
    if not (folder / "config.json").is_file():
        CONFIG_MAPPING[kind](**OVERRIDES.get(kind, {})).save_pretrained(folder)
    return summarise_model(ModelFiles(str(folder), folder))


def judge_methods(
    kind: str, base: PreTrainedModel, tower: Path, folder: Path, methods: list[str]
) -> dict[str, dict[str, str]]:
    try:
        seen = summary(folder / "base", kind)
    except UsageError as refusal:
        found = {name: {"refused": str(refusal)} for name in methods}
        for name in methods:  # the graft must say the same
            found[name].update(grafted_anyway(name, folder, tower, str(refusal)))
        return found
    except Exception as error:
        return {name: {"fails": f"inspect: {failure(error)}"} for name in methods}
    free = [layer.index for layer in seen.layers if layer.refused is None]
    verdicts: dict[str, dict[str, str]] = {}
    for name in methods:
        takes(name)
        try:
            verdicts[name] = judge_method(name, seen, free, base, tower, folder / name)
        except UsageError as refusal:
            left = (folder / name / "graft").exists()
            reason = f"after files were written: {refusal}" if left else str(refusal)
            verdicts[name] = {"fails" if left else "refused": reason}
            if name not in seen.refusals and free and not left:
                verdicts[name]["fails"] = f"refused by graft, not by inspect: {refusal}"
        except Exception as error:
            verdicts[name] = {"fails": failure(error)}
    return verdicts


def grafted_anyway(name: str, folder: Path, tower: Path, refusal: str) -> dict[str, str]:
    try:
        graft(name, [0], folder / "base", tower, folder / name)
    except UsageError as error:
        return {} if str(error) == refusal else {"fails": f"graft says otherwise: {error}"}
    except Exception as error:
        return {"fails": failure(error)}
    return {"fails": f"inspect refuses, graft does not: {refusal}"}


def judge_method(
    name: str, seen: ModelSummary, free: list[int], base: PreTrainedModel, tower: Path, folder: Path
) -> dict[str, str]:
    layers = sorted({free[0], free[-1]}) if free else [0]
    norm = "final norm" in seen.parts
    chosen = layers if name == "iaa" else free or [0]
    graft(name, chosen, folder.parent / "base", tower, folder, norm)
    if name in seen.refusals:
        return {"fails": f"inspect refuses, graft does not: {seen.refusals[name]}"}
    model = perturb(GraftedModel.from_pretrained(folder / "graft"))
    wrong = broken(Case(base, model, TOWER_WIDTH))
    if wrong:
        return {"fails": "; ".join(f"{name}: {what}" for name, what in wrong.items())}
    return {"works": f"layers {','.join(map(str, layers))}" if free else "works"}


def graft(
    name: str, layers: list[int], base: Path, tower: Path, folder: Path, norm: bool = True
) -> None:
    """Write a graft as `mmgraft graft` does."""
    configs: dict[str, Any] = {
        "iaa": IAAConfig(layers=layers, norm=norm),
        "wings": WingsConfig(rank=4, layers=layers),
        "llava": LlavaConfig(),
        "lora": LoraConfig(rank=4, layers=layers),
        "expert": ExpertConfig(layers=layers),
        "xattn": XattnConfig(layers=layers),
    }
    spec, plain = VisionSpec(id=str(tower)), TemplateChoice(kind="plain")
    create.create_graft(str(base), spec, configs[name], folder / "graft", template=plain)


def failure(error: Exception) -> str:
    """Return an exception with the line of our code that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "/mmgraft/" in f.filename]
    at = f" ({ours[-1]})" if ours else ""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}{at}"
