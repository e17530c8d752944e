"""Small multiple-choice sets, of text and of pictures, as files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from mmgraft.recipes.evaluation_set import SetSpec
from tiny_runs import COLOURS

THINGS = ("stone", "river", "apple", "horse", "cloud", "table", "lamp", "shoe", "boat", "door")


def choice_sets(folder: Path, texts: int = 9, images: int = 4) -> list[SetSpec]:
    """`text.jsonl` and `seen.jsonl` with its pictures, and what a recipe says of them."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = [
        {
            "id": f"t{at}",
            "question": f"{THINGS[at % len(THINGS)]} {at}?",
            "options": ["yes", "no", "or so"],
            "answer": draw.randrange(3),
        }
        for at in range(texts)
    ]
    seen: list[dict[str, Any]] = []
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for at in range(images):
        name = draw.choice(sorted(COLOURS))
        Image.new("RGB", (20, 16 + at), COLOURS[name]).save(folder / f"pictures/{at}.png")
        seen.append(
            {
                "id": f"v{at}",
                "image": f"pictures/{at}.png",
                "question": f"hue of {THINGS[at]}?",
                "options": sorted(COLOURS),
                "answer": name,
            }
        )
    for name, listed in (("text", rows), ("seen", seen)):
        lines = "".join(json.dumps(row) + "\n" for row in listed)
        (folder / f"{name}.jsonl").write_text(lines)
    asked = {"metric": "choice", "prompt": "{question}"}  # three fit into what a tiny base reads
    return [
        SetSpec(name="text", path=str(folder / "text.jsonl"), modality="text", **asked),
        SetSpec(name="seen", path=str(folder / "seen.jsonl"), **asked),
    ]
