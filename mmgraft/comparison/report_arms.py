"""The arms of a comparison as a report sees them: what each is, and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmgraft.comparison.files import PHASES, Phase, arm_folder, read_phase
from mmgraft.comparison.spec import Comparison
from mmgraft.evaluation.results import Results, Section, SetResult, measured
from mmgraft.model.graft_file import GraftFile
from mmgraft.runs import is_graft

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class MeasuredArm:
    """One arm.

    Attributes:
        name: Its name.
        description: The comparison's words for it.
        run: Its folder.
        record: What the graft is; None where it was not begun.
        sections: What was measured, by section.
        done: Phases that are done.
    """

    name: str
    description: str
    run: Path
    record: GraftFile | None
    sections: dict[Section, Results]
    done: tuple[Phase, ...]

    @property
    def method(self) -> str | None:
        """Of the graft."""
        return None if self.record is None else self.record.method

    @property
    def base_trained(self) -> bool:
        """Whether text may have changed."""
        return self.record is not None and self.record.base_trained

    @property
    def config(self) -> dict[str, Any]:
        """The method's settings."""
        return {} if self.record is None else self.record.config

    @property
    def training(self) -> dict[str, Any]:
        """What the training cost; empty where it is not done."""
        section = self.sections.get("training")
        return {} if section is None else section.details

    @property
    def identity(self) -> dict[str, Any] | None:
        """The proof about text."""
        section = self.sections.get("text")
        return None if section is None else section.identity

    @property
    def metrics(self) -> Path | None:
        """The training's log, where there is one."""
        path = self.run / METRICS
        return path if path.is_file() else None

    def sets(self, section: Section) -> list[SetResult]:
        """Sets of a section; none where it was not measured."""
        found = self.sections.get(section)
        return [] if found is None else found.sets

    def set_named(self, section: Section, name: str) -> SetResult | None:
        """A set of a section by its name."""
        return next((one for one in self.sets(section) if one.name == name), None)


def read_arms(out: Path, comparison: Comparison) -> list[MeasuredArm]:
    """Every arm in the comparison's order, as far as it has come.

    Raises:
        UsageError: A result or a phase's record is damaged.
    """
    arms = []
    for name, arm in comparison.all_arms().items():
        run = arm_folder(out, name)
        arms.append(
            MeasuredArm(
                name=name,
                description=arm.description,
                run=run,
                record=GraftFile.read(run) if is_graft(run) else None,
                sections={one.section: one for one in measured(run)},
                done=tuple(phase for phase in PHASES if _is_done(run, phase)),
            )
        )
    return arms


def set_names(arms: Sequence[MeasuredArm], section: Section) -> list[str]:
    """Sets that any arm was asked, in the order in which they were."""
    names: list[str] = []
    for arm in arms:
        names += [one.name for one in arm.sets(section) if one.name not in names]
    return names


def _is_done(run: Path, phase: Phase) -> bool:
    record = read_phase(run, phase)
    return record is not None and record.done
