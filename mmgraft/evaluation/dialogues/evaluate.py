"""Interleaved dialogues asked of a graft: built of multiple-choice sets, saved, and scored.

Source: the IIT benchmark of Wings (arXiv 2406.03496): dialogues in the shapes (T), (T,T), (T,T,T),
(T,T,V), (T,V) and (V), whose last question is scored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmgraft import __version__
from mmgraft.evaluation.dialogues.build import COUNT, EMBEDDING, Embed, build_iit
from mmgraft.evaluation.dialogues.dialogues import title
from mmgraft.evaluation.dialogues.files import ROWS, read_dialogues
from mmgraft.evaluation.generate.kept_answers import KeptAnswers
from mmgraft.evaluation.generate.run_features import run_features
from mmgraft.evaluation.items.files import file_sha256
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.likelihood.choice import ChoiceScore
from mmgraft.evaluation.metrics.measured import Measured
from mmgraft.evaluation.metrics.options import read_choice
from mmgraft.evaluation.metrics.scoring import groups_of, measure_choices
from mmgraft.evaluation.origin import as_score, as_scores, described_graft, software
from mmgraft.evaluation.vision import NO_IMAGE, blind_workflow, without_images
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import FOLDER as RESULTS
from mmgraft.runs.results import Results, SetResult

if TYPE_CHECKING:
    from mmgraft.inference import Answerer

MAX_NEW_TOKENS = 16


def evaluate_iit(
    answerer: Answerer,
    run: Path,
    specs: Sequence[SetSpec] = (),
    *,
    dialogues: Path | None = None,
    count: int = COUNT,
    shapes: Sequence[str] | None = None,
    seed: int = 0,
    workflow: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    generate: bool = True,
    root: Path | None = None,
    embed: Embed | None = None,
    embedding: str = EMBEDDING,
    announce: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Results:
    """Score the last question of every dialogue, by log-probability and by a generated answer.

    Dialogues with an image are scored without it too, by log-probability: their blind score. What
    a killed run has scored and answered is kept in `results/predictions/`, and not asked again.

    Args:
        answerer: The graft.
        run: Its folder.
        specs: Sets to build of; see :func:`build_iit`.
        dialogues: Folder of a data set that was saved before, such as another run's: it is asked
            as it is, so that runs can be compared. Default: `results/iit` of the run, built where
            it is not there.
        count: See :func:`build_iit`.
        shapes: See :func:`build_iit`.
        seed: See :func:`build_iit`.
        workflow: Of dialogues with an image; by default the graft's. Others run ``text``.
        batch_size: Dialogues at a time.
        max_new_tokens: A generated answer is cut there.
        generate: Generate answers too.
        root: See :func:`build_iit`.
        embed: See :func:`build_iit`.
        embedding: See :func:`build_iit`.
        announce: Told in sentences what is done.
        progress: Told how many dialogues are scored or answered, and of how many.

    Returns:
        Section `iit`, a set a shape; not yet written.

    Raises:
        UsageError: See :func:`build_iit`; a graft without the workflow; no such data set.
    """
    model = answerer.model
    graft = described_graft(model, run, workflow)
    folder = dialogues or run / RESULTS / "iit"
    found = (
        read_dialogues(folder)
        if dialogues is not None
        else build_iit(
            answerer, specs, folder, count=count, shapes=shapes, seed=seed, root=root,
            embed=embed, embedding=embedding, announce=announce,
        )
    )  # fmt: skip
    kept = KeptAnswers(model, answerer.processor, run, graft, batch_size, announce, progress)
    sha256 = file_sha256(folder / ROWS)
    measured: dict[str, Measured] = {}
    sets: list[SetResult] = []
    for shape, items in found.items():
        announce(f"{len(items)} dialogues {title(shape)}")
        start = time.monotonic()
        flow = graft["workflow"] if "V" in shape else TEXT_WORKFLOW
        features = run_features(model, run, items, announce)
        scores = kept.choices(f"iit.{shape}", items, flow, features=features)
        answers = (
            kept.answers(f"iit.{shape}.answers", items, flow, max_new_tokens, features)
            if generate
            else None
        )
        measured[shape] = measure_dialogues(items, scores, answers)
        groups = groups_of(items)
        blind = {}
        if "V" in shape:
            unseen = [replace(item, messages=without_images(item.messages)) for item in items]
            blindly = blind_workflow(model, flow)
            guessed = kept.choices(f"iit.{shape}.{NO_IMAGE}", unseen, blindly)
            blind[NO_IMAGE] = as_scores(measure_dialogues(items, guessed).scores(groups))
        sets.append(
            SetResult(
                name=title(shape),
                metric="choice",
                main="accuracy",
                file=ROWS,
                sha256=sha256,
                items=len(items),
                scores=as_scores(measured[shape].scores(groups)),
                blind=blind,
                settings={
                    "workflow": flow,
                    "chance": round(float(np.mean([1 / len(item.options) for item in items])), 4),
                    **({"max_new_tokens": max_new_tokens} if generate else {}),
                    "batch_size": batch_size,
                    **kept.numbers,
                },
                predictions=kept.file(f"iit.{shape}").relative_to(run).as_posix(),
                seconds=time.monotonic() - start,
            )
        )
    return Results(
        section="iit",
        mmgraft_version=__version__,
        versions=software(),
        graft=graft,
        sets=sets,
        details={"against_the_question_alone": _against_alone(found, measured)},
    )


def measure_dialogues(
    items: Sequence[Item],
    scores: Sequence[ChoiceScore],
    answers: Sequence[str] | None = None,
) -> Measured:
    """Accuracies of the last questions.

    Args:
        items: Dialogues.
        scores: Log-probabilities of their options: `accuracy` takes the likeliest option, the
            others the likeliest a token or a character.
        answers: Generated: `accuracy_generated` takes the option that an answer names, and
            `unread` is the share of answers that name none, which are wrong.
    """
    chosen = measure_choices(items, scores)
    if answers is None:
        return chosen
    named = [read_choice(answer, item.options) for item, answer in zip(items, answers, strict=True)]
    right = [place == item.gold for item, place in zip(items, named, strict=True)]
    said = Measured.means(accuracy_generated=right, unread=[place is None for place in named])
    return chosen.beside(said)


def _against_alone(
    found: Mapping[str, Sequence[Item]], measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """How what stands before a question changes its scores: paired, the same last questions."""
    changes: dict[str, Any] = {}
    for shape in measured:
        alone = shape[-1]
        if shape == alone or alone not in measured:
            continue
        change = measured[shape].change(measured[alone], groups_of(found[shape]))
        changes[title(shape)] = {name: as_score(one).model_dump() for name, one in change.items()}
    return changes
