"""Runs a comparison: every arm through its phases, each phase once, whatever kills it between."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.atomic import atomic_text
from mmgraft.comparison.child import check_platform, locked
from mmgraft.comparison.evaluations import dialogue_settings, measure
from mmgraft.comparison.features import fill_features
from mmgraft.comparison.files import (
    COMPARISON,
    FEATURES,
    PHASES,
    Phase,
    PhaseRecord,
    Sitting,
    first_difference,
    is_done,
    read_phase,
    write_phase,
)
from mmgraft.comparison.plan import ArmPlan, ComparisonPlan, make_graft
from mmgraft.comparison.spec import dump_comparison
from mmgraft.comparison.training import train_arm
from mmgraft.errors import UsageError
from mmgraft.training.recipe_source import dump_recipe
from mmgraft.training.run import RECIPE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

    from mmgraft.answering import Answerer

LOCK = ".comparison.lock"
_NOT_OF_TRAINING = frozenset(
    {"name", "description", "evaluation", "feature_cache", "log_every", "workers", "tracking"}
)
"""Keys of a recipe that may change between two sittings."""


@dataclass(frozen=True)
class Compared:
    """What a call did.

    Attributes:
        out: The comparison's folder.
        arms: Phases that are done, by arm.
        reports: Files of the report; none where nothing is measured yet.
    """

    out: Path
    arms: dict[str, list[str]]
    reports: list[Path]


def compare(
    plan: ComparisonPlan,
    *,
    train_only: bool = False,
    batch_size: int | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> Compared:
    """Run what is left of a comparison and write its report.

    A phase that is done is not done again, but evaluations whose settings have changed since are;
    a training that was stopped goes on from its last checkpoint.

    Args:
        plan: From `make_plan`.
        train_only: Leave evaluation and report to a later call.
        batch_size: Of questions; None leaves it to each evaluation.
        announce: Told in sentences what goes on.

    Raises:
        UsageError: Another process is at work there, or an arm was begun with other settings.
        MMGraftError: A training or an evaluation failed; the same command goes on.
    """
    check_platform()
    for arm in plan.arms:
        if arm.name in plan.chosen:
            check_unchanged(plan, arm)
    plan.out.mkdir(parents=True, exist_ok=True)
    with locked(plan.out / LOCK):
        atomic_text(plan.out / COMPARISON, dump_comparison(plan.comparison))
        for number, arm in enumerate(plan.arms, start=1):
            if arm.name in plan.chosen:
                announce(f"arm {arm.name} ({number} of {len(plan.arms)})")
                _Arm(plan, arm, batch_size, announce).run(train_only)
        reports = [] if train_only else _report(plan.out)
    done = {arm.name: [phase for phase in PHASES if _is_done(arm.run, phase)] for arm in plan.arms}
    return Compared(plan.out, done, reports)


def settings_of(plan: ComparisonPlan, arm: ArmPlan, phase: Phase) -> dict[str, Any] | None:
    """What a phase depends on, as plain data; None where there is nothing to do in it."""
    spec = plan.comparison
    recipe = _plain(arm.recipe)
    if phase == "graft":
        return {
            "base": plan.base,
            "vision": _plain(plan.vision),
            "template": spec.template,
            **{key: recipe[key] for key in ("method", "workflow", "graft") if key in recipe},
        }
    if phase == "features":
        return (
            {"data": [stage["data"] for stage in recipe["stages"]]} if _shares(plan, arm) else None
        )
    if phase == "train":
        return {key: value for key, value in recipe.items() if key not in _NOT_OF_TRAINING}
    if phase == "laws":
        return None if spec.laws is None else _plain(spec.laws)
    if phase == "iit":
        return None if spec.iit is None else dialogue_settings(spec)
    asked = [
        _plain(one) for one in spec.evaluation if (one.modality == "text") == (phase == "text")
    ]
    # The text section also proves identity, for which it needs no set.
    return {"sets": asked} if asked or phase == "text" else None


def check_unchanged(plan: ComparisonPlan, arm: ArmPlan) -> None:
    """Refuse to go on with an arm whose graft or training was begun with other settings.

    Raises:
        UsageError: With the first key that differs and what to do.
    """
    for phase in ("graft", "train"):
        record = read_phase(arm.run, phase)
        if record is None:
            continue
        difference = first_difference(record.settings, settings_of(plan, arm, phase))
        if difference is not None:
            raise UsageError(
                f"arm {arm.name!r} of {plan.out} was begun with other settings ({difference}); "
                f"give another folder with --out, or remove {arm.run} to do this arm anew"
            )


class _Arm:
    """One arm on its way through the phases."""

    def __init__(
        self,
        plan: ComparisonPlan,
        arm: ArmPlan,
        batch_size: int | None,
        announce: Callable[[str], None],
    ) -> None:
        self.plan = plan
        self.arm = arm
        self.batch_size = batch_size
        self.announce = announce
        self._answerer: Answerer | None = None

    def run(self, train_only: bool) -> None:
        """What is left of the arm, in order."""
        for phase in PHASES:
            settings = settings_of(self.plan, self.arm, phase)
            if settings is None or is_done(self.arm.run, phase, settings):
                continue
            if phase == "graft":
                self._graft(settings)
            elif phase == "features":
                self._features(settings)
            elif phase == "train":
                self._train(settings)
            elif not train_only:
                self._evaluate(phase, settings)
        self._answerer = None
        gc.collect()  # before the next arm loads its own

    def _graft(self, settings: dict[str, Any]) -> None:
        arm = self.arm
        arm.run.mkdir(parents=True, exist_ok=True)
        with self._sitting(PhaseRecord(phase="graft", settings=settings)):
            make_graft(self.plan, arm.recipe, arm.run)
            atomic_text(arm.run / RECIPE, dump_recipe(arm.recipe))

    def _features(self, settings: dict[str, Any]) -> None:
        with self._sitting(PhaseRecord(phase="features", settings=settings)):
            fill_features(self.arm, self.plan.device, self.announce)

    def _train(self, settings: dict[str, Any]) -> None:
        record = read_phase(self.arm.run, "train")
        if record is None:
            record = PhaseRecord(phase="train", settings=settings)
            write_phase(self.arm.run, record)
        record = train_arm(self.arm, record, self.plan.device, self.announce)
        self.announce(f"{self.arm.name}: trained in {record.seconds:.0f} s")

    def _evaluate(self, phase: Phase, settings: dict[str, Any]) -> None:
        record = read_phase(self.arm.run, phase)
        if record is None or record.settings != settings:
            if record is not None and record.done:
                self.announce(
                    f"{self.arm.name}: {phase} is measured anew, for its settings changed"
                )
            record = PhaseRecord(phase=phase, settings=settings)
        with self._sitting(record):
            self.announce(f"{self.arm.name}: measuring {phase}")
            measure(phase, self._loaded(), self.plan, self.arm, self.batch_size, self.announce)

    def _loaded(self) -> Answerer:
        """The trained arm, loaded when the first evaluation asks it."""
        if self._answerer is None:
            from mmgraft.answering import Answerer

            self._answerer = Answerer.load(self.arm.run, device=self.plan.device)
        return self._answerer

    @contextmanager
    def _sitting(self, record: PhaseRecord) -> Iterator[None]:
        """Times a phase of this process, and notes it as done if it did not fail."""
        began = datetime.now(timezone.utc).isoformat(timespec="seconds")
        clock, cpu = time.monotonic(), time.process_time()
        done = False
        try:
            yield
            done = True
        finally:
            sitting = Sitting(
                began=began,
                seconds=time.monotonic() - clock,
                cpu_seconds=time.process_time() - cpu,
            )
            sittings = [*record.sittings, sitting]
            write_phase(
                self.arm.run, record.model_copy(update={"done": done, "sittings": sittings})
            )


def _shares(plan: ComparisonPlan, arm: ArmPlan) -> bool:
    """Whether the arm keeps its features where all arms do."""
    return arm.recipe.feature_cache == str(plan.out.resolve() / FEATURES)


def _plain(model: BaseModel) -> dict[str, Any]:
    """What is set, as plain data: a key that a later mmgraft adds changes no arm that has begun."""
    return model.model_dump(mode="json", exclude_defaults=True)


def _is_done(run: Path, phase: Phase) -> bool:
    record = read_phase(run, phase)
    return record is not None and record.done


def _report(out: Path) -> list[Path]:
    from mmgraft.comparison.report import write_comparison_report

    return list(write_comparison_report(out).values())
