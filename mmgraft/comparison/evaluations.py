"""What is measured of a trained arm: text, vision, dialogues and attention sums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.comparison.files import BASE, DIALOGUES, Phase
from mmgraft.comparison.plan import ArmPlan, ComparisonPlan
from mmgraft.comparison.spec import Comparison
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
        phase: `text`, `vision`, `iit` or `laws`.
        answerer: The trained arm.
        plan: Of the comparison.
        arm: The arm.
        batch_size: None leaves it to the evaluation.
        announce: Told what goes on.

    Raises:
        UsageError: A set that cannot be asked; nothing is written.
    """
    sizes = {} if batch_size is None else {"batch_size": batch_size}
    work = {"text": _text, "vision": _vision, "iit": _iit, "laws": _laws}[phase]
    write_results(arm.run, work(answerer, plan, arm, announce, sizes))


def dialogue_settings(comparison: Comparison) -> dict[str, Any]:
    """What the dialogues of a comparison depend on, as plain data."""
    assert comparison.iit is not None
    sets = [] if comparison.iit.path is not None else comparison.choices
    return {
        "iit": comparison.iit.model_dump(mode="json"),
        "sets": [one.model_dump(mode="json", exclude_defaults=True) for one in sets],
    }


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


def _iit(
    answerer: Answerer,
    plan: ComparisonPlan,
    arm: ArmPlan,
    announce: Announce,
    sizes: dict[str, Any],
) -> Results:
    from mmgraft.evaluation.iit import evaluate_iit

    folder = _dialogues(answerer, plan, announce)
    return evaluate_iit(answerer, arm.run, dialogues=folder, announce=announce, **sizes)


def _dialogues(answerer: Answerer, plan: ComparisonPlan, announce: Announce) -> Path:
    """The folder of the dialogues, the same for all arms: the first that is asked builds them.

    Its name tells what they were made with, for a trained base would find other questions alike,
    and building them anew for it would ask it other dialogues.
    """
    from mmgraft.evaluation.iit_building import build_iit

    spec = plan.comparison
    assert spec.iit is not None
    if spec.iit.path is not None:
        return Path(spec.iit.path)
    text = json.dumps(dialogue_settings(spec), sort_keys=True)
    folder = plan.out / DIALOGUES / hashlib.sha256(text.encode()).hexdigest()[:12]
    if not folder.is_dir():
        settings = spec.iit.model_dump(exclude={"path"})
        build_iit(answerer, spec.choices, folder, announce=announce, **settings)
    return folder


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

    laws = plan.comparison.laws
    assert laws is not None
    items = read_items(laws.items())
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
