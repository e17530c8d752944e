"""What is measured of a trained arm: text, vision, dialogues and attention sums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
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
    settings: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    settings["announce"] = announce
    work = {"text": _text, "vision": _vision, "iit": _iit, "laws": _laws}[phase]
    write_results(arm.run, work(_Asked(answerer, plan, arm.run, settings)))


@dataclass(frozen=True)
class _Asked:
    """What every section is measured with.

    Attributes:
        answerer: The trained arm.
        plan: Of the comparison.
        run: Folder of the arm.
        settings: Of the evaluation: whom to tell, and the batch size where one was given.
    """

    answerer: Answerer
    plan: ComparisonPlan
    run: Path
    settings: dict[str, Any]


def dialogue_settings(comparison: Comparison) -> dict[str, Any]:
    """What the dialogues of a comparison depend on, as plain data."""
    assert comparison.iit is not None
    sets = [] if comparison.iit.path is not None else comparison.choices
    return {
        "iit": comparison.iit.model_dump(mode="json"),
        "sets": [one.model_dump(mode="json", exclude_defaults=True) for one in sets],
    }


def _text(asked: _Asked) -> Results:
    from mmgraft.evaluation.text import evaluate_text

    plan = asked.plan
    sets = [one for one in plan.comparison.evaluation if one.modality == "text"]
    return evaluate_text(
        asked.answerer,
        asked.run,
        sets,
        untouched=plan.base,
        base_cache=plan.out / BASE,
        **asked.settings,
    )


def _vision(asked: _Asked) -> Results:
    from mmgraft.evaluation.vision import evaluate_vision

    sets = [one for one in asked.plan.comparison.evaluation if one.modality == "image"]
    return evaluate_vision(asked.answerer, asked.run, sets, **asked.settings)


def _iit(asked: _Asked) -> Results:
    from mmgraft.evaluation.iit import evaluate_iit

    folder = _dialogues(asked)
    return evaluate_iit(asked.answerer, asked.run, dialogues=folder, **asked.settings)


def _dialogues(asked: _Asked) -> Path:
    """The folder of the dialogues, the same for all arms: the first that is asked builds them.

    Its name tells what they were made with, for a trained base would find other questions alike,
    and building them anew for it would ask it other dialogues.
    """
    from mmgraft.evaluation.iit_building import build_iit

    spec = asked.plan.comparison
    assert spec.iit is not None
    if spec.iit.path is not None:
        return Path(spec.iit.path)
    text = json.dumps(dialogue_settings(spec), sort_keys=True)
    folder = asked.plan.out / DIALOGUES / hashlib.sha256(text.encode()).hexdigest()[:12]
    if not folder.is_dir():
        settings = spec.iit.model_dump(exclude={"path"})
        announce = asked.settings["announce"]
        build_iit(asked.answerer, spec.choices, folder, announce=announce, **settings)
    return folder


def _laws(asked: _Asked) -> Results:
    from mmgraft.evaluation.item_files import read_items
    from mmgraft.evaluation.laws import evaluate_laws
    from mmgraft.evaluation.run_features import run_features

    laws = asked.plan.comparison.laws
    assert laws is not None
    items = read_items(laws.items())
    model, announce = asked.answerer.model, asked.settings["announce"]
    return evaluate_laws(
        asked.answerer,
        items,
        asked.run,
        file=Path(laws.path),
        features=run_features(model, asked.run, items, announce),
        settings=laws.model_dump(mode="json", exclude={"path", "images"}),
        **asked.settings,
    )
