"""What the demo found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from mmgraft.evaluation.identity import IdentityReport
from mmgraft.runs.results import Score as Estimate


@dataclass(frozen=True)
class Score:
    """How many of the test questions were answered right.

    Attributes:
        overall: All of them, with an interval.
        kinds: The share for `color`, `shape` and `yes/no`.
    """

    overall: Estimate
    kinds: dict[str, float]


@dataclass(frozen=True)
class Phase:
    """A part of the demo and how long it took.

    Attributes:
        name: What was done.
        seconds: By the clock.
        cpu_seconds: Of processor time, all threads together: what it costs whatever else runs.
    """

    name: str
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Turn:
    """One question and answer of the short chat; `image` is a file or None."""

    question: str
    answer: str
    image: str | None


@dataclass
class DemoReport:
    """Everything that the final table shows.

    Attributes:
        method: Of the graft.
        base: Folder or Hub id.
        vision: Name of the tower.
        questions: Test questions asked, drawn by a fixed seed.
        question_only: The most frequent training answer to each question.
        before: The fresh graft.
        after: The trained one.
        identity: Text of the trained graft beside an untouched base.
        parameters: Of the graft, those that were trained.
        base_parameters: Of the base, none of which was.
        steps: Of the optimizer, by stage.
        chat: A few turns.
        phases: In order, with their time.
        seconds: All of them together, by the clock.
        cpu_seconds: Of processor time.
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
        """Plain data for JSON."""
        return TypeAdapter(type(self)).dump_python(self)

    def results(self) -> dict[str, Any]:
        """What goes into the graft's record, and from there into a model card."""
        return {
            f"easy-VQA test, {self.questions} questions": {
                "question only": str(self.question_only.overall),
                "before training": str(self.before.overall),
                "after training": str(self.after.overall),
            },
            "text logits identical to the base": "yes" if self.identity.identical else "no",
        }
