"""Check which files of a run go along: one name for every pattern, that no other pattern has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mmgraft.runs.contents import belonging, managed

GO = [
    "LICENSE.txt", "NOTICE", "added_tokens.json", "additional_chat_templates/tools.jinja",
    "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
    "graft.safetensors", "licenses/gpl.txt", "merges.txt", "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken", "recipe.yaml", "results.json", "results/curves.png", "results/report.html",
    "results/report.md", "results/vision.json", "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json", "vocab.txt",
]  # fmt: skip
STAY = [
    "checkpoints/1-tune/state.json", "checkpoints/tokenizer.json.old", "metrics.jsonl", "notes.txt",
    "optimizer.pt", "other.safetensors", "results/predictions/set.jsonl", "results/raw.jsonl",
    "base/config.json", "vision/tokenizer.json", ".env",
]  # fmt: skip
OF_A_MODEL = ["config.json", "model.safetensors", "tokenizer.json", "sub/modeling.txt", "README.md"]
NEVER = [
    "checkpoint-5/config.json", "optimizer.bin", "scheduler.bin", "rng_state_0.pkl",
    "training_args.pt", "old.pth", ".hidden", ".git/config", "sub/.cache/x",
]  # fmt: skip


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("safetensors"):
            save_file({"a": np.zeros(2)}, folder / name)
        else:
            (folder / name).write_text("{}")


def test_what_makes_the_graft_goes_along_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path, [*GO, *STAY])
    assert [file.name for file in belonging(tmp_path)] == sorted(GO)


@pytest.mark.parametrize("folder", ["base", "vision"])
def test_a_model_folder_goes_along_without_what_a_training_left(
    tmp_path: Path, folder: str
) -> None:
    fill(tmp_path, ["graft.safetensors"])
    fill(tmp_path / folder, [*OF_A_MODEL, *NEVER])
    found = [file.name for file in belonging(tmp_path, [folder])]
    assert found == sorted(["graft.safetensors", *(f"{folder}/{name}" for name in OF_A_MODEL)])


def test_a_push_replaces_what_a_push_wrote() -> None:
    written = [
        "graft.safetensors", "graft-0-00001-of-00002.safetensors", "graft.safetensors.index.json",
        "recipe.yaml", "results.json", "results/vision.json", "results/report.md",
        "results/report.html", "results/curves.png", "base/config.json", "base/sub/config.json",
    ]  # fmt: skip
    assert [name for name in written if not managed(name)] == []
    others = [
        "README.md",
        "LICENSE",
        "picture.jpg",
        "tokenizer.json",
        "model.safetensors",
        "data.txt",
    ]
    assert [name for name in others if managed(name)] == []
