"""Vision scores: sets of questions about images, with two blind scores beside every score."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmgraft.data.chat.turns import is_image
from mmgraft.errors import UsageError
from mmgraft.evaluation.generate.run_features import Features, run_features
from mmgraft.evaluation.kept import Kept, read_predictions
from mmgraft.evaluation.metrics import scoring
from mmgraft.evaluation.metrics.answers import shows_options
from mmgraft.evaluation.metrics.intervals import Measured
from mmgraft.evaluation.origin import described_graft, section_of
from mmgraft.evaluation.report.sheets import write_box_sheet
from mmgraft.evaluation.sets import EvaluatedSet, read_sets
from mmgraft.inference import Answerer
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.progress import say
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import Results, SetResult

BATCH_SIZE = 32
NO_IMAGE = "no_image"


def evaluate_vision(
    answerer: Answerer,
    run: Path,
    specs: Sequence[SetSpec],
    *,
    workflow: str | None = None,
    batch_size: int = BATCH_SIZE,
) -> Results:
    """Evaluate sets with images by each set's metric.

    A killed run is continued: predictions are kept in ``results/predictions/`` of the run, one file
    for the answers and one for those without the image.

    Args:
        answerer: The graft.
        run: Its folder.
        specs: The sets.
        workflow: Of all rows with images, unless a set names its own; default: the graft's.
        batch_size: Questions a batch.

    Returns:
        Section ``vision``; not yet written.

    Raises:
        UsageError: See :func:`read_sets`; a graft without the workflow.
        MMGraftError: The disk is full; what was answered is kept.
    """
    model = answerer.model
    sets = read_sets(specs, "image")
    workflows = [
        seeing_workflow(each.spec, workflow, model.default_workflow, model.names) for each in sets
    ]
    graft = described_graft(model, run, workflow)
    kept = Kept(model, answerer.processor, run, graft, batch_size)
    measured = [_evaluate(kept, each, name) for each, name in zip(sets, workflows, strict=True)]
    return section_of("vision", graft, measured)


def without_images(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the same conversation without its image parts; nothing stands in for them."""
    made = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            texts = [part for part in content if not is_image(part)]
            content = "".join(str(part.get("text", "")) for part in texts)
            message = {**message, "content": content}
        made.append(dict(message))
    return made


def blind_workflow(model: GraftedModel, workflow: str) -> str:
    """Return what a question without its image runs: the same workflow, or ``text``.

    ``text`` where the graft promises nothing for rows without an image.
    """
    return TEXT_WORKFLOW if model.workflow(workflow).graft.promises.no_image else workflow


def seeing_workflow(spec: SetSpec, given: str | None, default: str, names: Sequence[str]) -> str:
    """Return the workflow of a set.

    Args:
        spec: The set.
        given: Of all sets that name none.
        default: The graft's own.
        names: All that the graft has.

    Raises:
        UsageError: The graft does not have it, or it cannot see.
    """
    name = spec.workflow or given or default
    if name not in names:
        why = "is the base alone, which cannot see" if name == TEXT_WORKFLOW else "is not there"
        raise UsageError(
            f"set {spec.name!r}: workflow {name!r} {why}; this graft has: {', '.join(names)}"
        )
    return name


def _evaluate(kept: Kept, each: EvaluatedSet, workflow: str) -> SetResult:
    spec, items = each.spec, each.items
    start = time.monotonic()
    features = run_features(kept.model, kept.run, items)
    say(f"{spec.name}: {len(items)} questions")
    measured = measure_set(kept, each, workflow, features)
    groups = scoring.groups_of(items)
    blind = {}
    if each.prior is not None:
        blind["prior"] = each.prior.scores(groups)
    blindly = blind_workflow(kept.model, workflow)
    if NO_IMAGE in spec.blind:
        say(f"{spec.name}: the same questions without their images")
        blind[NO_IMAGE] = measure_set(kept, each, blindly, blind=True).scores(groups)
    settings = {
        "workflow": workflow,
        "no_image_workflow": blindly if NO_IMAGE in spec.blind else None,
        "max_new_tokens": _tokens(spec),
        "batch_size": kept.batch_size,
        "prompt": spec.prompt,
        "boxes": spec.boxes,
        "limit": spec.limit,
        "seed": spec.seed if spec.limit is not None else None,
        "train": None if spec.train is None else Path(spec.train).name,
        **kept.numbers,
    }
    return each.result(
        measured,
        groups,
        settings,
        blind=blind,
        kinds=scoring.scores_by_kind(measured, items),
        predictions=kept.shown_file(spec.name),
        sheet=_sheet(kept, each) if spec.metric == "box" else None,
        seconds=time.monotonic() - start,
    )


def _sheet(kept: Kept, each: EvaluatedSet) -> str | None:
    """Draw the contact sheet of boxes from the answers that were kept."""
    rows = read_predictions(kept.file(each.spec.name))
    said = {str(row["id"]): str(row["answer"]) for row in rows}
    answers = [said[item.id] for item in each.items]
    return write_box_sheet(kept.run, each.spec, each.file, each.items, answers)


def measure_set(
    kept: Kept,
    each: EvaluatedSet,
    workflow: str,
    features: Features | None = None,
    blind: bool = False,
) -> Measured:
    """Score a set's answers, with or without its images.

    Args:
        kept: Model and store.
        each: The set.
        workflow: Of all rows.
        features: The tower's features of image files.
        blind: Leave the images out.
    """
    spec, items, name = each.spec, each.items, each.spec.name
    if blind:
        items = [replace(item, messages=without_images(item.messages)) for item in items]
        name = f"{name}.{NO_IMAGE}"
    if spec.metric == "choice":
        letters = shows_options(spec.prompt)
        return scoring.measure_choices(
            items, kept.choices(name, items, workflow, letters, features)
        )
    answers = kept.answers(name, items, workflow, _tokens(spec) or 0, features)
    return scoring.measure_answers(spec, items, answers)


def _tokens(spec: SetSpec) -> int | None:
    if spec.metric == "choice":
        return None
    return spec.max_new_tokens or scoring.ANSWER_TOKENS[spec.metric]
