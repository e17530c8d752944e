"""Dialogues as a data set: a folder with ``dialogues.jsonl``, its images, and their sources.

Every line is a row that can be trained on, whose last turn is the right answer, and an item that
can be evaluated: ``options``, ``answer`` (its number from 0), ``kind`` (the shape), ``group`` (what
    the
last question is about) and ``from`` (set and id of every question). Free of torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmgraft.atomic import atomic_folder, atomic_json, atomic_text
from mmgraft.data.chat.content import image_of
from mmgraft.data.images import is_data_uri
from mmgraft.errors import UsageError
from mmgraft.evaluation.dialogues.dialogues import Dialogue, answer_turn
from mmgraft.evaluation.items.files import file_sha256, read_items
from mmgraft.evaluation.items.item import Item, with_images
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.textfiles import read_json

VERSION = 1
ROWS = "dialogues.jsonl"
RECORD = "dataset.json"
IMAGES = "images"


def save_dialogues(
    folder: Path, built: Mapping[str, Sequence[Dialogue]], made_of: Mapping[str, Any]
) -> None:
    """Write the data set; what stood in the folder stays until it is whole.

    Args:
        folder: Of the data set.
        built: Dialogues by shape.
        made_of: Seed, sources with their SHA-256 and what else decides the dialogues; plain data.

    Raises:
        MMGraftError: The disk is full or cannot be written to.
    """

    def write(fresh: Path) -> None:
        names: dict[str, str] = {}
        lines = [
            json.dumps(_row(dialogue, fresh / IMAGES, names), ensure_ascii=False)
            for dialogues in built.values()
            for dialogue in dialogues
        ]
        atomic_text(fresh / ROWS, "".join(line + "\n" for line in lines))
        record = {
            "mmgraft_dialogues": VERSION,
            "made_of": dict(made_of),
            "shapes": {shape: len(dialogues) for shape, dialogues in built.items()},
            "sha256": file_sha256(fresh / ROWS),
        }
        atomic_json(fresh / RECORD, record)

    atomic_folder(folder, write)


def is_made_of(folder: Path, made_of: Mapping[str, Any]) -> bool:
    """Return whether the folder holds the dialogues that building them again would give.

    Raises:
        UsageError: Its rows are not those that were saved.
    """
    record = _record(folder)
    return record is not None and record.get("made_of") == json.loads(json.dumps(made_of))


def read_dialogues(folder: Path) -> dict[str, list[Item]]:
    """Read the items of a saved data set by shape, the last question of each to be scored.

    Raises:
        UsageError: There is none, its rows are not those that were saved, or an image is missing.
    """
    record = _record(folder)
    if record is None:
        raise UsageError(f"no dialogues in {folder}; build them with: mmgraft eval RUN --iit")
    seeing = any("V" in shape for shape in record["shapes"])
    spec = SetSpec(
        name="iit",
        path=str(folder / ROWS),
        metric="choice",
        modality="image" if seeing else "text",
        prompt=None if seeing else "{question}",  # as it stands
    )
    found: dict[str, list[Item]] = {shape: [] for shape in record["shapes"]}
    for item in read_items(spec):
        found[str(item.kind)].append(item)
    return found


def _record(folder: Path) -> dict[str, Any] | None:
    path, rows = folder / RECORD, folder / ROWS
    if not path.is_file():
        return None
    record = read_json(path, "remove the folder to build them again")
    whole = record.get("mmgraft_dialogues") == VERSION
    if not whole or not rows.is_file() or file_sha256(rows) != record["sha256"]:
        raise UsageError(
            f"{folder} does not hold the dialogues that were saved there: {ROWS} was changed, or "
            f"{RECORD} is damaged or of another version; remove the folder to build them again"
        )
    return record


def _row(dialogue: Dialogue, images: Path, names: dict[str, str]) -> dict[str, Any]:
    last = dialogue.last
    turns = [*dialogue.messages(), answer_turn(last)]
    return {
        "id": dialogue.id,
        "messages": [_with_copies(turn, images, names) for turn in turns],
        "options": list(last.options),
        "answer": last.gold,
        "kind": dialogue.shape,
        "group": hashlib.sha256((last.group or last.id).encode()).hexdigest()[:16],
        "from": [{"set": part.set, "id": part.item.id} for part in dialogue.parts],
    }


def _with_copies(turn: Mapping[str, Any], folder: Path, names: dict[str, str]) -> dict[str, Any]:
    """Return a turn whose images lie in a folder, each once, named by what they hold."""

    def copied(part: Any) -> dict[str, Any]:
        path = os.fspath(image_of(part))
        if path not in names:
            names[path] = path if is_data_uri(path) else _copied(Path(path), folder)
        return {"type": "image", "image": names[path]}

    return with_images(turn, copied)


def _copied(path: Path, folder: Path) -> str:
    name = file_sha256(path)[:16] + path.suffix.lower()
    folder.mkdir(exist_ok=True)
    shutil.copyfile(path, folder / name)
    return f"{IMAGES}/{name}"
