"""The kept grafts: how each was made, and what is asked of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from mmgraft import GraftedModel
from unchanged.comparing import tensor_hash
from unchanged.conditions import one_thread

KEPT = Path(__file__).resolve().parent / "kept"
HERE = "<here>"
"""Stands in the kept files for the folder that they lie in."""

GRAFTS: dict[str, list[str]] = {
    # Options of `mmgraft graft`.
    "iaa-c": ["--method", "iaa", "--layers", "0,2", "--structure", "c", "--no-projector-norm"],
    "iaa-b": ["--method", "iaa", "--layers", "1,2", "--structure", "b", "--gate", "linear",
              "--no-embedding", "--no-head"],
    "iaa-a": ["--method", "iaa", "--layers", "0,1", "--structure", "a", "--gate", "scalar",
              "--no-embedding", "--no-norm", "--no-head"],
    "wings": ["--method", "wings", "--rank", "2", "--max-length", "64"],
    "llava": ["--method", "llava", "--no-projector-norm"],
}  # fmt: skip
OFFICIAL, STOPPED, TRAINED_BASE, FULL = "wings-official", "stopped", "trained-base", "full"
LOADED = [*GRAFTS, OFFICIAL, STOPPED, TRAINED_BASE, FULL]
TO_LLAVA = ["iaa-c", "llava", TRAINED_BASE, FULL]

_TEXTS = (".json", ".yaml", ".md")
_LENGTHS = (13, 9)
_FIRST_IMAGE_POSITION = (3, 2)
_PATCHES, _SIDE = 4, 16
_SHOWN = 12


def unpack(folder: Path) -> Path:
    """Copy everything that is kept into `folder`, where its paths then lead."""
    shutil.copytree(KEPT, folder, dirs_exist_ok=True)
    _replace(folder, HERE, str(folder))
    return folder


def pack(folder: Path, names: list[str]) -> None:
    """Keep these folders below `folder`, without its path."""
    shutil.rmtree(KEPT, ignore_errors=True)
    for name in names:
        shutil.copytree(folder / name, KEPT / name)
    _replace(KEPT, str(folder), HERE)


def _replace(folder: Path, old: str, new: str) -> None:
    for path in folder.rglob("*"):
        if path.suffix in _TEXTS:
            text = path.read_text(encoding="utf-8")
            if old in text:
                path.write_text(text.replace(old, new), encoding="utf-8")


def logits(model: GraftedModel) -> dict[str, Any]:
    """A few logits, and the hash of all, of two rows with a picture and of the second's text.

    Inputs are computed from positions alone, so that no generator and no tokenizer has a part.
    """
    inputs = _rows()
    with one_thread(), torch.no_grad():
        seen = model(**inputs, use_cache=False).logits
        text = model(input_ids=inputs["input_ids"][1:, :2], use_cache=False).logits
    own = torch.cat([row[:length] for row, length in zip(seen, _LENGTHS, strict=True)])
    return {"pictures": _numbers(own), "text": _numbers(text)}


def _numbers(tensor: torch.Tensor) -> dict[str, Any]:
    flat = tensor.float().flatten()
    places = torch.linspace(0, len(flat) - 1, _SHOWN).long()
    return {"values": flat[places].tolist(), "sha256": tensor_hash(tensor)}


def _rows() -> dict[str, torch.Tensor]:
    longest = max(_LENGTHS)
    ids, mask, kinds = (torch.zeros(2, longest, dtype=torch.long) for _ in range(3))
    for row, (length, first) in enumerate(zip(_LENGTHS, _FIRST_IMAGE_POSITION, strict=True)):
        ids[row, :length] = 6 + (7 * torch.arange(length) + 11 * row) % 300
        mask[row, :length] = 1
        kinds[row, first : first + _PATCHES] = 1
    count = 2 * 3 * _SIDE * _SIDE
    pixels = ((torch.arange(count) % 23) - 11).float() / 11
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": kinds,
        "pixel_values": pixels.reshape(2, 3, _SIDE, _SIDE),
    }
