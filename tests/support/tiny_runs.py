"""Run folders to train: a tiny base, a tiny tower, a fresh graft, and a few picture questions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from mmgraft.grafts.registry import get_method
from mmgraft.model.files.create import create_graft
from mmgraft.vision.spec import ProjectorSpec, VisionSpec
from tiny import save_base
from tiny_towers import save_tower

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230)}

CONFIGS: dict[str, dict[str, Any]] = {
    "iaa": {"layers": [1, 2], "embedding": False, "head": False},
    "wings": {"rank": 4},
    "llava": {},
    "lora": {"rank": 4},
    "expert": {"layers": [1, 3]},
    "xattn": {"layers": [0, 2]},
    "wings-official": {},
}


def make_parts(folder: Path, arch: str = "llama") -> Path:
    """A base and a tower of 4 patches, to be shared by many runs."""
    save_base(folder / "base", arch)
    save_tower(folder / "tower", "clip", image_size=16)
    make_rows(folder)
    return folder


def make_run(parts: Path, run: Path, method: str, /, projector: Any = None, **config: Any) -> Path:
    """A fresh graft on the shared base, the same every time."""
    torch.manual_seed(0)
    settings = get_method(method).config_class.model_validate({**CONFIGS[method], **config})
    vision = VisionSpec(id=str(parts / "tower"))
    create_graft(
        str(parts / "base"), vision, settings, run, projector=projector or ProjectorSpec(norm=True)
    )
    return run


def make_rows(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """`rows.jsonl` and its pictures: questions about a colour, every fourth without a picture."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        name = draw.choice(sorted(COLOURS))
        question: Any = f"what is {number}?"
        if number % 4 != 3:
            Image.new("RGB", (20, 16), COLOURS[name]).save(images / f"{number}.png")
            question = [
                {"type": "image", "image": f"{number}.png"},
                {"type": "text", "text": "which colour?" + " please" * (number % 3)},
            ]
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": name + "." * (number % 4)},
        ]
        lines.append(json.dumps({"id": str(number), "messages": turns}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def write_recipe(run: Path, parts: Path, method: str, stages: list[dict[str, Any]], **more: Any):
    """`recipe.yaml` of a run, on the shared rows, logging every step."""
    recipe = {
        "name": "test",
        "method": method,
        "precision": "fp32",
        "log_every": 1,
        "data": [{"path": str(parts / "rows.jsonl"), "images": str(parts / "images")}],
        "stages": stages,
        **more,
    }
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def losses(run: Path) -> list[tuple[str, int, float]]:
    """(stage, step, loss) of every line of metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"], line["loss"]) for line in lines if "loss" in line]
