"""A comparison of tiny runs, and stand-ins for what is measured of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_runs import CONFIGS, make_parts

STAGE = {"name": "tune", "lr": 1e-3, "batch_size": 4, "max_steps": 2}
TRAINS = {"llava": ["projector"], "iaa": ["projector", "layers"], "wings": ["learners.visual"]}


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a tower and rows."""
    folder = make_parts(tmp_path_factory.mktemp("parts"))
    (folder / "read.csv").write_text("which?,one,two,three,four,B\nwhat?,one,two,three,four,A\n")
    for method, trains in TRAINS.items():
        recipe = {
            "name": f"tiny-{method}",
            "method": method,
            "precision": "fp32",
            "log_every": 1,
            "graft": {"config": CONFIGS[method]},
            "stages": [{**STAGE, "train": trains}],
        }
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def write(parts: Path, tmp_path: Path):
    """Writes a comparison of the tiny parts, with changes, and gives its file."""

    def make(**changes: Any) -> Path:
        spec: dict[str, Any] = {
            "name": "tiny",
            "base": str(parts / "base"),
            "vision": {"id": str(parts / "tower")},
            "root": str(parts),
            "images": "images",
            "data": {"tune": "rows.jsonl"},
            "arms": {name: {"recipe": str(parts / f"{name}.yaml")} for name in ("llava", "iaa")},
            **changes,
        }
        path = tmp_path / "tiny.yaml"
        kept = {key: value for key, value in spec.items() if value is not None}
        path.write_text(yaml.safe_dump(kept, sort_keys=False))
        return path

    return make
