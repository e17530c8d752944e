"""A training that stops in its second stage, at a picture whose middle is broken, and goes on.

So a stop needs no signal at the right moment, and what was saved before is the same every time.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from unchanged.parts import command, write_recipe

ROWS, BROKEN = 6, 4
STEP = 3
"""The last step that is taken: the seed draws the broken picture for the fifth, read ahead."""

_SHARED = {"batch_size": 1, "lr": 2e-3, "eps": 1e-4}
ALIGN = {**_SHARED, "name": "align", "train": ["projector"], "max_steps": 2}
TUNE = {**_SHARED, "name": "tune", "train": ["projector", "graft"], "max_steps": 6}


def train_until_it_stops(run: Path, parts: Path, method: str, **recipe: Any) -> None:
    """Train a fresh graft of a method; its rows are put beside the run."""
    late = run.parent / "late"
    make_late_rows(late)
    data = [{"path": str(late / "rows.jsonl"), "images": str(late)}]
    write_recipe(run, parts, method, [ALIGN, {**TUNE, "data": data}], save_every=2, **recipe)
    said = command("train", run, "--device", "cpu", code=2)
    assert f"saved after step {STEP}" in said, said


def go_on(run: Path) -> None:
    """Mend the picture and train to the end."""
    mend(run.parent / "late")
    command("train", run, "--resume", "--device", "cpu")


def make_late_rows(folder: Path) -> None:
    """Rows with a picture each, of which one is broken."""
    folder.mkdir()
    lines = []
    for number in range(ROWS):
        _noise(number).save(folder / f"{number}.png")
        turns = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": f"{number}.png"},
                    {"type": "text", "text": f"Number {number}?"},
                ],
            },
            {"role": "assistant", "content": "grey" + "." * number},
        ]
        lines.append(json.dumps({"id": str(number), "messages": turns}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    broken = folder / f"{BROKEN}.png"
    data = bytearray(broken.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = bytes(16)
    broken.write_bytes(data)


def mend(folder: Path) -> None:
    """Put the whole picture in the broken one's place."""
    _noise(BROKEN).save(folder / f"{BROKEN}.png")


def _noise(number: int) -> Image.Image:
    draw = random.Random(number)
    return Image.frombytes("L", (24, 24), draw.randbytes(24 * 24))
