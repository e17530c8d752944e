"""Work of one process in the phases of an arm: tower features, and each kind of evaluation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from mmgraft.comparison.files import BASE, DIALOGUES, Phase
from mmgraft.comparison.plan import ArmPlan, ComparisonPlan
from mmgraft.comparison.spec import Comparison
from mmgraft.data.features import fill_cache, open_cache
from mmgraft.data.formats.indexed import Joined
from mmgraft.evaluation.attention.laws import evaluate_laws
from mmgraft.evaluation.dialogues.build import build_iit
from mmgraft.evaluation.dialogues.evaluate import evaluate_iit
from mmgraft.evaluation.generate.run_features import run_features
from mmgraft.evaluation.items.files import read_items
from mmgraft.evaluation.text import evaluate_text
from mmgraft.evaluation.vision import evaluate_vision
from mmgraft.inference import Answerer
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import local_tower
from mmgraft.progress import say
from mmgraft.runs.results import write_results
from mmgraft.training.devices import default_workers
from mmgraft.training.stage_data import StageData
from mmgraft.vision.towers.registry import load_tower


def fill_features(arm: ArmPlan, device: str) -> None:
    """Compute the tower's features of an arm's images, in the precision of its training.

    Arms share them, and no arm's training time contains them.

    Args:
        arm: Its recipe keeps features in a folder; its run holds a graft.
        device: Where to compute.

    Raises:
        UsageError: An image that cannot be read, with its row, unless the recipe skips such rows.
    """
    recipe = arm.recipe
    assert isinstance(recipe.feature_cache, str)
    full = recipe.base == "full" or any(stage.precision == "fp32" for stage in recipe.stages)
    dtype = torch.float32 if full else torch.bfloat16
    tower = load_tower(local_tower(GraftFile.read(arm.run), arm.run), dtype=dtype, device=device)
    cache = open_cache(tower, Path(recipe.feature_cache))
    reader = StageData(recipe.on_bad_row)
    rows = Joined(
        [reader.rows(one.data or [], recipe.seed, one.image_share) for one in recipe.stages]
    )
    bad = [] if recipe.on_bad_row == "skip" else None
    count = fill_cache(cache, tower, rows, bad=bad, workers=default_workers(device))
    say(f"{arm.name}: features of {count} images are in {cache.folder}")
    if left_out := len({row.key for row in [*reader.bad, *(bad or [])]}):
        say(f"{arm.name}: {left_out} rows cannot be used; its training leaves them out")


def evaluate(
    phase: Phase, answerer: Answerer, plan: ComparisonPlan, arm: ArmPlan, **more: Any
) -> None:
    """Evaluate one section of an arm and write it into its results.

    Args:
        phase: ``text``, ``vision``, ``iit`` or ``laws``.
        answerer: The trained arm.
        plan: The comparison.
        arm: The arm.
        **more: ``batch_size``, unless the evaluation chooses it.

    Raises:
        UsageError: A set that cannot be evaluated; nothing is written.
    """
    spec, run = plan.comparison, arm.run
    if phase == "text":
        sets = [one for one in spec.evaluation if one.modality == "text"]
        shared = plan.out / BASE
        results = evaluate_text(answerer, run, sets, untouched=plan.base, base_cache=shared, **more)
    elif phase == "vision":
        sets = [one for one in spec.evaluation if one.modality == "image"]
        results = evaluate_vision(answerer, run, sets, **more)
    elif phase == "iit":
        folder = _dialogues(answerer, plan)
        results = evaluate_iit(answerer, run, dialogues=folder, **more)
    else:
        assert spec.laws is not None
        items = read_items(spec.laws.items())
        results = evaluate_laws(
            answerer,
            items,
            run,
            file=Path(spec.laws.path),
            features=run_features(answerer.model, run, items),
            settings=spec.laws.model_dump(mode="json", exclude={"path", "images"}),
            **more,
        )
    write_results(run, results)


def dialogue_settings(comparison: Comparison) -> dict[str, Any]:
    """Return what the dialogues of a comparison depend on, as plain data."""
    assert comparison.iit is not None
    sets = [] if comparison.iit.path is not None else comparison.choices
    return {
        "iit": comparison.iit.model_dump(mode="json"),
        "sets": [one.model_dump(mode="json", exclude_defaults=True) for one in sets],
    }


def _dialogues(answerer: Answerer, plan: ComparisonPlan) -> Path:
    """Return the folder of the dialogues, which the first arm builds for all.

    Its name depends on their settings. Another arm, such as one with a trained base, would find
    other questions alike and build other dialogues.
    """
    spec = plan.comparison
    assert spec.iit is not None
    if spec.iit.path is not None:
        return Path(spec.iit.path)
    text = json.dumps(dialogue_settings(spec), sort_keys=True)
    folder = plan.out / DIALOGUES / hashlib.sha256(text.encode()).hexdigest()[:12]
    if not folder.is_dir():
        own = spec.iit.model_dump(exclude={"path"})
        build_iit(answerer, spec.choices, folder, **own)
    return folder
