"""What is measured of a trained arm: text, vision and attention sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.comparison.files import BASE, Phase
from mmgraft.comparison.plan import ArmPlan, ComparisonPlan
from mmgraft.evaluation.results import write_results

if TYPE_CHECKING:
    from mmgraft.answering import Answerer
    from mmgraft.evaluation.results import Results

Announce = Callable[[str], None]


def measure(
    phase: Phase,
    answerer: Answerer,
    plan: ComparisonPlan,
    arm: ArmPlan,
    batch_size: int | None,
    announce: Announce,
) -> None:
    """Measure one section of an arm and write it into its results.

    Args:
        phase: `text`, `vision` or `laws`.
        answerer: The trained arm.
        plan: Of the comparison.
        arm: The arm.
        batch_size: None leaves it to the evaluation.
        announce: Told what goes on.

    Raises:
        UsageError: A set that cannot be asked; nothing is written.
    """
    sizes = {} if batch_size is None else {"batch_size": batch_size}
    work = {"text": _text, "vision": _vision, "laws": _laws}[phase]
    write_results(arm.run, work(answerer, plan, arm, announce, sizes))


def _text(
    answerer: Answerer,
    plan: ComparisonPlan,
    arm: ArmPlan,
    announce: Announce,
    sizes: dict[str, Any],
) -> Results:
    from mmgraft.evaluation.text import evaluate_text

    sets = [one for one in plan.comparison.evaluation if one.modality == "text"]
    return evaluate_text(
        answerer,
        arm.run,
        sets,
        untouched=plan.base,
        base_cache=plan.out / BASE,
        announce=announce,
        **sizes,
    )


def _vision(
    answerer: Answerer,
    plan: ComparisonPlan,
    arm: ArmPlan,
    announce: Announce,
    sizes: dict[str, Any],
) -> Results:
    from mmgraft.evaluation.vision import evaluate_vision

    sets = [one for one in plan.comparison.evaluation if one.modality == "image"]
    return evaluate_vision(answerer, arm.run, sets, announce=announce, **sizes)


def _laws(
    answerer: Answerer,
    plan: ComparisonPlan,
    arm: ArmPlan,
    announce: Announce,
    sizes: dict[str, Any],
) -> Results:
    from mmgraft.evaluation.item_files import read_items
    from mmgraft.evaluation.laws import evaluate_laws
    from mmgraft.evaluation.run_features import run_features
    from mmgraft.evaluation.set_spec import SetSpec

    laws = plan.comparison.laws
    assert laws is not None
    items = read_items(SetSpec(name="laws", metric="exact", **laws.model_dump()))
    return evaluate_laws(
        answerer,
        items,
        arm.run,
        file=Path(laws.path),
        features=run_features(answerer.model, arm.run, items, announce),
        settings=laws.model_dump(mode="json", exclude={"path", "images"}),
        announce=announce,
        **sizes,
    )
