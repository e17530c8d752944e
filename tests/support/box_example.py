"""A set of boxes in a folder, with or without a source file that states its licence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from PIL import Image

from mmgraft.evaluation.metrics.boxes import format_box
from mmgraft.recipes.evaluation_set import SetSpec

SIZE = (40, 30)
BOX = (4.0, 3.0, 24.0, 18.0)
GPL = "GPL-2 (stamps), CC0 and CC BY (photographs); not to be passed on without their notices"


def make_boxes(folder: Path, licence: str | None = None, count: int = 3) -> SetSpec:
    """`boxes.jsonl`, its pictures, and `made.source.json` where a licence is given."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        name = f"images/{number}.png"
        Image.new("RGB", SIZE, (200, 60 * number, 40)).save(folder / name)
        parts = [
            {"type": "image", "image": name},
            {"type": "text", "text": f"where is thing {number}?"},
        ]
        answer = format_box(BOX, "unit", SIZE)
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        rows.append({"id": str(number), "messages": turns, "box": list(BOX)})
    file = folder / "boxes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if licence is not None:
        state_licence(folder, licence)
    return SetSpec(name="things", metric="box", path=str(file), boxes="unit", blind=[])


def state_licence(folder: Path, licence: str, name: str = "made") -> None:
    """Return what `mmgraft data prepare` writes beside its files."""
    sums = {"boxes.jsonl": hashlib.sha256((folder / "boxes.jsonl").read_bytes()).hexdigest()}
    source = {"name": name, "licence": licence, "sha256": sums}
    (folder / f"{name}.source.json").write_text(json.dumps(source))
