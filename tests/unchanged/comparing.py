"""Say in words what differs from a recording, to the bit or within a tolerance."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

RECORDED = Path(__file__).resolve().parent / "recorded"

TOLERANCE = 1e-5
"""Bound of a number, absolute and relative, where conditions differ from those of the recording."""

BOUND = ("sha256", "of another package")
"""Keys that end so hold what says nothing under other conditions."""


def tensor_hash(tensor: Tensor) -> str:
    """The first 16 digits of the SHA-256 of a tensor's bytes."""
    import torch

    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def value_hash(value: Any) -> str:
    """The same of what JSON can write."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(
    recorded: Any, now: Any, exact: bool, tolerance: float = TOLERANCE, where: str = ""
) -> Iterator[str]:
    """Every place where two recordings differ.

    Args:
        recorded: what JSON gives back.
        now: the same, made anew.
        exact: compare numbers to the bit, and hashes too.
        tolerance: of numbers otherwise.
        where: the place so far.
    """
    if isinstance(recorded, dict) and isinstance(now, dict):
        for key in sorted(recorded.keys() | now.keys()):
            place = f"{where}/{key}" if where else key
            if key not in now:
                yield f"{place} is gone"
            elif key not in recorded:
                yield f"{place} is new"
            elif exact or not key.endswith(BOUND):
                yield from differences(recorded[key], now[key], exact, tolerance, place)
    elif isinstance(recorded, list) and isinstance(now, list):
        if len(recorded) != len(now):
            yield f"{where} has {len(now)} entries, not {len(recorded)}: {_short(now)}"
            return
        for number, (before, after) in enumerate(zip(recorded, now, strict=True)):
            yield from differences(before, after, exact, tolerance, f"{where}[{number}]")
    elif not _same(recorded, now, exact, tolerance):
        yield f"{where} was {_short(recorded)} and is {_short(now)}"


def _same(recorded: Any, now: Any, exact: bool, tolerance: float) -> bool:
    numbers = (int, float)
    if isinstance(recorded, bool) or isinstance(now, bool) or exact:
        return type(recorded) is type(now) and recorded == now
    if isinstance(recorded, numbers) and isinstance(now, numbers):
        return math.isclose(recorded, now, rel_tol=tolerance, abs_tol=tolerance)
    return bool(recorded == now)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:120]} ... {text[-30:]}"


def dump(value: Any) -> str:
    """JSON to be read in a diff: a line for each key, and one for a list of plain values."""
    return _lines(value, "") + "\n"


def _lines(value: Any, indent: str) -> str:
    deeper = indent + " "
    if isinstance(value, dict) and value:
        keys = [f"{deeper}{json.dumps(k, ensure_ascii=False)}: " for k in value]
        each = [key + _lines(one, deeper) for key, one in zip(keys, value.values(), strict=True)]
        return "{\n" + ",\n".join(each) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        each = [deeper + _lines(one, deeper) for one in value]
        return "[\n" + ",\n".join(each) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def read(name: str) -> Any:
    """A recording."""
    return json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
