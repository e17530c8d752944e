"""The demo's results as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from mmgraft.evaluation.identity import IdentityReport
from mmgraft.runs.results import Score as Estimate


@dataclass(frozen=True)
class Score:
    """Share of the test questions that were answered right.

    Attributes:
        overall: All of them, with an interval.
        kinds: The share for ``color``, ``shape`` and ``yes/no``.
    """

    overall: Estimate
    kinds: dict[str, float]


@dataclass(frozen=True)
class Phase:
    """A part of the demo and how long it took.

    Attributes:
        name: Name of the part.
        seconds: Time by the clock.
        cpu_seconds: Processor time of all threads: what it costs whatever else runs.
    """

    name: str
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Turn:
    """One question and answer of the short chat; ``image`` is a file or None."""

    question: str
    answer: str
    image: str | None


@dataclass
class DemoReport:
    """Everything that the final table shows.

    Attributes:
        method: Method of the graft.
        base: Folder or Hub id.
        vision: Name of the tower.
        questions: Number of test questions, sampled with a fixed seed.
        question_only: The most frequent training answer to each question.
        before: The fresh graft.
        after: The trained one.
        identity: Text of the trained graft beside an untouched base.
        parameters: Number of the graft's parameters that were trained.
        base_parameters: Number of the base's parameters, none of which was.
        steps: Optimizer steps by stage.
        chat: A few turns.
        phases: The phases in order, with their time.
        seconds: Time of all phases, by the clock.
        cpu_seconds: Processor time of all phases.
        out: The run's folder.
        sheet: The contact sheet.
    """

    method: str
    base: str
    vision: str
    questions: int
    question_only: Score
    before: Score
    after: Score
    identity: IdentityReport
    parameters: int
    base_parameters: int
    steps: dict[str, int]
    out: str
    sheet: str
    chat: list[Turn] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return TypeAdapter(type(self)).dump_python(self)

    def results(self) -> dict[str, Any]:
        """Return the entries of the graft's record, which go into its model card."""
        return {
            f"easy-VQA test, {self.questions} questions": {
                "question only": str(self.question_only.overall),
                "before training": str(self.before.overall),
                "after training": str(self.after.overall),
            },
            "text logits identical to the base": "yes" if self.identity.identical else "no",
        }
