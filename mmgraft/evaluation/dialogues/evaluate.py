"""Interleaved dialogues evaluated on a graft: built from multiple-choice sets, saved, and scored.

Source: the IIT benchmark of Wings (arXiv 2406.03496): dialogues in the shapes (T), (T,T), (T,T,T),
(T,T,V), (T,V) and (V), whose last question is scored.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmgraft.evaluation.dialogues.build import COUNT, build_iit
from mmgraft.evaluation.dialogues.dialogues import ROWS, read_dialogues, title
from mmgraft.evaluation.generate.run_features import run_features
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.kept import Kept
from mmgraft.evaluation.metrics.choice import read_choice
from mmgraft.evaluation.metrics.intervals import Measured
from mmgraft.evaluation.metrics.scoring import groups_of
from mmgraft.evaluation.origin import described_graft, section_of
from mmgraft.evaluation.sets import EvaluatedSet
from mmgraft.evaluation.vision import NO_IMAGE, blind_workflow, measure_set
from mmgraft.inference import Answerer
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.progress import say
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import FOLDER as RESULTS
from mmgraft.runs.results import Results, SetResult

MAX_NEW_TOKENS = 16
"""Largest number of tokens of a generated answer."""


def evaluate_iit(
    answerer: Answerer,
    run: Path,
    specs: Sequence[SetSpec] = (),
    *,
    dialogues: Path | None = None,
    count: int = COUNT,
    workflow: str | None = None,
    batch_size: int = 16,
) -> Results:
    """Score the last question of every dialogue, by log-probability and by a generated answer.

    Dialogues with an image are scored without it too, by log-probability: their blind score. A
    killed run is continued: what it scored and answered is kept in ``results/predictions/``.

    Args:
        answerer: The graft.
        run: Its folder.
        specs: Sets to build from; see :func:`build_iit`.
        dialogues: Folder of saved ones; default: ``results/iit`` of the run, built where missing.
        count: See :func:`build_iit`.
        workflow: Of dialogues with an image; by default the graft's. Others run ``text``.
        batch_size: Dialogues a batch.

    Returns:
        Section ``iit``, a set a shape; not yet written.

    Raises:
        UsageError: See :func:`build_iit`; a graft without the workflow; no such data set.
    """
    graft = described_graft(answerer.model, run, workflow)
    folder = dialogues or run / RESULTS / "iit"
    if dialogues is not None:
        found = read_dialogues(folder)
    else:
        found = build_iit(answerer, specs, folder, count=count)
    kept = Kept(answerer.model, answerer.processor, run, graft, batch_size)
    measured: dict[str, Measured] = {}
    sets: list[SetResult] = []
    for shape, items in found.items():
        say(f"{len(items)} dialogues {title(shape)}")
        spec = SetSpec(name=f"iit.{shape}", metric="choice")
        measured[shape], result = _evaluate(kept, shape, EvaluatedSet(spec, folder / ROWS, items))
        sets.append(result)
    details = {"against_the_question_alone": _against_alone(found, measured)}
    return section_of("iit", graft, sets, details=details)


def _evaluate(kept: Kept, shape: str, each: EvaluatedSet) -> tuple[Measured, SetResult]:
    """Evaluate the dialogues of one shape."""
    start, name, items = time.monotonic(), each.spec.name, each.items
    workflow = kept.graft["workflow"] if "V" in shape else TEXT_WORKFLOW
    features = run_features(kept.model, kept.run, items)
    chosen = measure_set(kept, each, workflow, features)
    answers = kept.answers(f"{name}.answers", items, workflow, MAX_NEW_TOKENS, features)
    measured, groups = chosen.beside(measure_generated(items, answers)), groups_of(items)
    blind = {}
    if "V" in shape:
        blindly = blind_workflow(kept.model, workflow)
        blind[NO_IMAGE] = measure_set(kept, each, blindly, blind=True).scores(groups)
    settings = {
        "workflow": workflow,
        "chance": round(float(np.mean([1 / len(item.options) for item in items])), 4),
        "max_new_tokens": MAX_NEW_TOKENS,
        "batch_size": kept.batch_size,
        **kept.numbers,
    }
    result = each.result(
        measured,
        groups,
        settings,
        blind=blind,
        predictions=kept.shown_file(name),
        seconds=time.monotonic() - start,
    )
    return measured, result.model_copy(update={"name": title(shape)})


def measure_generated(items: Sequence[Item], answers: Sequence[str]) -> Measured:
    """Measure generated answers to multiple choice.

    Args:
        items: Dialogues.
        answers: ``accuracy_generated`` takes the option that an answer names, and ``unread`` is the
            share of answers that name none, which are wrong.
    """
    named = [read_choice(answer, item.options) for item, answer in zip(items, answers, strict=True)]
    right = [index == item.gold for item, index in zip(items, named, strict=True)]
    return Measured.means(accuracy_generated=right, unread=[index is None for index in named])


def _against_alone(
    found: Mapping[str, Sequence[Item]], measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """Return how the turns before a question change its scores: paired, the same last questions."""
    changes: dict[str, Any] = {}
    for shape in measured:
        alone = shape[-1]
        if shape == alone or alone not in measured:
            continue
        change = measured[shape].change(measured[alone], groups_of(found[shape]))
        changes[title(shape)] = {name: one.model_dump() for name, one in change.items()}
    return changes
