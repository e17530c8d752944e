"""The folder of a comparison: which file is where, and what is done. Free of torch.

OUT/comparison.yaml       the settings, paths absolute and grid expanded, arms in order
OUT/arms/NAME/            a run as any other: graft, recipe.yaml, metrics.jsonl, results/
OUT/arms/NAME/phases/     PHASE.json: its settings, its sessions, whether it is done
OUT/features/             the tower's features, shared by the arms
OUT/base/                 scores of the untouched base, shared by the arms
OUT/dialogues/            interleaved dialogues, the same for all arms
OUT/report.*              written by ``mmgraft.comparison.report``
"""

import json
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import AliasChoices, Field

from mmgraft.atomic import atomic_json
from mmgraft.comparison.spec import Comparison, load_comparison
from mmgraft.errors import UsageError
from mmgraft.strict import StrictModel, about
from mmgraft.textfiles import read_json

COMPARISON = "comparison.yaml"
ARMS, FEATURES, BASE, PHASES_FOLDER = "arms", "features", "base", "phases"
DIALOGUES = "dialogues"
Phase = Literal["graft", "features", "train", "text", "vision", "iit", "laws"]
PHASES: tuple[Phase, ...] = get_args(Phase)


def arm_folder(out: Path, name: str) -> Path:
    """Return the run of an arm."""
    return out / ARMS / name


def read_comparison(out: Path) -> Comparison:
    """Read the comparison that was last run in a folder.

    Raises:
        UsageError: None was.
    """
    path = out / COMPARISON
    if not path.is_file():
        raise UsageError(f"{out} holds no {COMPARISON}; make one with: mmgraft compare RECIPE")
    return load_comparison(path)


class Session(StrictModel):
    """One uninterrupted part of a phase."""

    began: str = Field(description="UTC, ISO 8601")
    seconds: float = Field(description="by the clock")
    cpu_seconds: float = Field(description="seconds of processor time, all threads together")
    peak_memory_mb: float | None = about("peak of main memory in MiB")


class PhaseRecord(StrictModel):
    """Progress of a phase of an arm, and its settings."""

    phase: Phase
    done: bool = False
    settings: dict[str, Any] = Field(default_factory=dict)
    sessions: list[Session] = Field(
        default_factory=list,
        validation_alias=AliasChoices("sessions", "sittings"),  # as earlier versions wrote it
        description="in order",
    )

    @property
    def seconds(self) -> float:
        """Time of all sessions."""
        return sum(one.seconds for one in self.sessions)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all sessions."""
        return sum(one.cpu_seconds for one in self.sessions)

    @property
    def peak_memory_mb(self) -> float | None:
        """The largest peak of all sessions."""
        peaks = [one.peak_memory_mb for one in self.sessions if one.peak_memory_mb is not None]
        return max(peaks, default=None)

    def after(self, session: Session, done: bool = False) -> "PhaseRecord":
        """Return the record with one more session."""
        return self.model_copy(update={"sessions": [*self.sessions, session], "done": done})


def phase_file(run: Path, phase: Phase) -> Path:
    """Return the file of a phase's record."""
    return run / PHASES_FOLDER / f"{phase}.json"


def read_phase(run: Path, phase: Phase) -> PhaseRecord | None:
    """Read a phase's record; None where it was not started.

    Raises:
        UsageError: The file is damaged.
    """
    path = phase_file(run, phase)
    if not path.is_file():
        return None
    data = read_json(path, f"remove {run}, and the arm is done anew")
    return PhaseRecord.parse(data, str(path))


def write_phase(run: Path, record: PhaseRecord) -> None:
    """Write how far a phase has come, in one step."""
    path = phase_file(run, record.phase)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_json(path, record.model_dump(mode="json"))


def phases_done(run: Path) -> list[Phase]:
    """Return the phases that are done, with whatever settings.

    Raises:
        UsageError: A record is damaged.
    """
    records = [read_phase(run, phase) for phase in PHASES]
    return [record.phase for record in records if record is not None and record.done]


def first_difference(one: Any, two: Any, where: str = "") -> str | None:
    """Return the first key at which plain data differ, with both values; None if they are equal."""
    pairs: list[tuple[Any, Any, Any]] = []  # key and both values
    if isinstance(one, dict) and isinstance(two, dict):
        pairs = [(key, one.get(key), two.get(key)) for key in dict.fromkeys([*one, *two])]
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for index, (first, second) in enumerate(zip(one, two, strict=True)):
            name = first.get("name", index) if isinstance(first, dict) else index
            pairs.append((name, first, second))
    elif one != two:
        return f"{where}: {_short(one)} before, {_short(two)} now"
    found = (first_difference(a, b, f"{where}.{name}".lstrip(".")) for name, a, b in pairs)
    return next((one for one in found if one is not None), None)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
