"""A tiny easy-VQA, a tiny base that knows its words, and a recipe that fits both."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmgraft.demo import easy_vqa
from mmgraft.demo.assets import DemoModels
from mmgraft.vision.spec import VisionSpec
from tiny import save_base
from tiny_towers import save_tower

RGB = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230)}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> DemoModels:
    folder = tmp_path_factory.mktemp("models")
    save_base(folder / "base", "llama")
    save_tower(folder / "tower", "clip", image_size=16)
    return DemoModels(str(folder / "base"), VisionSpec(id=str(folder / "tower")))


@pytest.fixture(scope="session")
def tiny_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of the published data, with whole pictures of one colour for shapes."""
    root = tmp_path_factory.mktemp("easy-vqa")
    rng = random.Random(0)
    for split, count in (("train", 12), ("test", 8)):
        (root / split / "images").mkdir(parents=True)
        asked: list[tuple[str, str, int]] = []
        for number in range(count):
            color = rng.choice(sorted(RGB))
            Image.new("RGB", (16, 16), RGB[color]).save(root / split / f"images/{number}.png")
            asked += [
                ("what color is the shape?", color, number),
                ("what shape is present?", "circle", number),
                ("is there a red shape?", "yes" if color == "red" else "no", number),
            ]
        (root / split / "questions.json").write_text(json.dumps(asked))
    return root


@pytest.fixture
def tiny_data(tiny_pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(easy_vqa, "folder", lambda: tiny_pictures)
    return tiny_pictures


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Path:
    """Two short stages of IAA, at rates that change a tiny model."""
    stage = {"batch_size": 4, "max_steps": 3}
    recipe = {
        "name": "tiny-demo",
        "method": "iaa",
        "graft": {
            "config": {"layers": [1, 2], "embedding": False, "head": False},
            "projector": {"norm": True},
        },
        "precision": "fp32",
        "feature_cache": True,
        "data": [{"path": None}],
        "stages": [
            {"name": "align", "train": ["projector"], "graft_active": False, "lr": 0.01, **stage},
            {"name": "tune", "train": ["projector", "layers", "norm"], "lr": 0.01, **stage},
        ],
    }
    path = tmp_path / "tiny-demo.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
