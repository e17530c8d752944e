"""The folder of a comparison: what lies where, and what is done. Free of torch.

OUT/comparison.yaml       the settings, paths whole and grid expanded, arms in order
OUT/arms/NAME/            a run as any other: graft, recipe.yaml, metrics.jsonl, results/
OUT/arms/NAME/phases/     PHASE.json: what it was done with, its sittings, whether it is done
OUT/features/             the tower's features, shared by the arms
OUT/base/                 scores of the untouched base, shared by the arms
OUT/dialogues/            interleaved dialogues, the same for all arms
OUT/report.*              written by `mmgraft.comparison.report`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mmgraft.atomic import atomic_json
from mmgraft.comparison.spec import Comparison, load_comparison
from mmgraft.errors import UsageError
from mmgraft.strict import StrictModel

COMPARISON = "comparison.yaml"
ARMS, FEATURES, BASE, PHASES_FOLDER = "arms", "features", "base", "phases"
DIALOGUES = "dialogues"
Phase = Literal["graft", "features", "train", "text", "vision", "iit", "laws"]
PHASES: tuple[Phase, ...] = ("graft", "features", "train", "text", "vision", "iit", "laws")


def arm_folder(out: Path, name: str) -> Path:
    """The run of an arm."""
    return out / ARMS / name


def read_comparison(out: Path) -> Comparison:
    """The comparison that was last run in a folder.

    Raises:
        UsageError: None was.
    """
    path = out / COMPARISON
    if not path.is_file():
        raise UsageError(f"{out} holds no {COMPARISON}; make one with: mmgraft compare RECIPE")
    return load_comparison(path)


class Sitting(StrictModel):
    """One uninterrupted part of a phase."""

    began: str = Field(description="UTC, ISO 8601")
    seconds: float = Field(description="by the clock")
    cpu_seconds: float = Field(description="of processor time, all threads together")
    peak_memory_mb: float | None = Field(default=None, description="of main memory, MiB")


class PhaseRecord(StrictModel):
    """How far a phase of an arm has come, and with which settings."""

    phase: Phase
    done: bool = False
    settings: dict[str, Any] = Field(default_factory=dict)
    sittings: list[Sitting] = Field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of all sittings."""
        return sum(one.seconds for one in self.sittings)

    @property
    def cpu_seconds(self) -> float:
        """Of all sittings."""
        return sum(one.cpu_seconds for one in self.sittings)

    @property
    def peak_memory_mb(self) -> float | None:
        """The largest of all sittings."""
        peaks = [one.peak_memory_mb for one in self.sittings if one.peak_memory_mb is not None]
        return max(peaks, default=None)


def phase_file(run: Path, phase: Phase) -> Path:
    """Where a phase's record lies."""
    return run / PHASES_FOLDER / f"{phase}.json"


def read_phase(run: Path, phase: Phase) -> PhaseRecord | None:
    """A phase's record, or None where it was not begun.

    Raises:
        UsageError: The file is damaged.
    """
    path = phase_file(run, phase)
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{path} is damaged ({error}); remove {run}, and the arm is done anew"
        ) from None
    return PhaseRecord.parse(data, str(path))


def write_phase(run: Path, record: PhaseRecord) -> None:
    """Record how far a phase has come, in one step."""
    path = phase_file(run, record.phase)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_json(path, record.model_dump(mode="json"))


def is_done(run: Path, phase: Phase, settings: dict[str, Any]) -> bool:
    """Whether a phase was done with just these settings."""
    record = read_phase(run, phase)
    return record is not None and record.done and record.settings == settings


def first_difference(one: Any, two: Any, where: str = "") -> str | None:
    """The first key at which two pieces of plain data differ, with both values; None: nowhere."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in (*one, *(key for key in two if key not in one)):
            found = first_difference(one.get(key), two.get(key), f"{where}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for place, (first, second) in enumerate(zip(one, two, strict=True)):
            name = first.get("name", place) if isinstance(first, dict) else place
            found = first_difference(first, second, f"{where}.{name}")
            if found is not None:
                return found
        return None
    return None if one == two else f"{where}: {_short(one)} before, {_short(two)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
