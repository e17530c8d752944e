"""What a graft sees: sets of questions about pictures, with two blind scores beside every score."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft import __version__
from mmgraft.data.chat.content import is_image
from mmgraft.errors import UsageError
from mmgraft.evaluation.generate.answers import Features
from mmgraft.evaluation.generate.kept_answers import KeptAnswers
from mmgraft.evaluation.generate.predictions import read_predictions
from mmgraft.evaluation.generate.run_features import run_features
from mmgraft.evaluation.items.files import (
    data_file,
    file_sha256,
    read_items,
    read_training_answers,
)
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.likelihood.choice import shows_options
from mmgraft.evaluation.metrics.measured import Measured
from mmgraft.evaluation.metrics.scoring import (
    ANSWER_TOKENS,
    groups_of,
    measure_answers,
    measure_choices,
    measure_prior,
    scores_by_kind,
)
from mmgraft.evaluation.origin import as_scores, described_graft, software
from mmgraft.evaluation.report.sheets import write_box_sheet
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import Results, SetResult

if TYPE_CHECKING:
    from mmgraft.inference import Answerer
    from mmgraft.model.modeling import GraftedModel

BATCH_SIZE = 32
NO_IMAGE = "no_image"
Announce = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class VisionSet:
    """A set that was read and can be asked.

    Attributes:
        spec: What the recipe says of it.
        file: Its file of items.
        items: In the order of the file.
        prior: What `prior` scores; None where the set names no training rows.
    """

    spec: SetSpec
    file: Path
    items: list[Item]
    prior: Measured | None


def read_vision_sets(
    specs: Sequence[SetSpec], root: Path | None = None, announce: Announce = lambda text: None
) -> list[VisionSet]:
    """Read and check sets before a model is asked anything.

    Args:
        specs: Of sets with images.
        root: What relative paths start from.
        announce: Told of a set that gets no prior score.

    Raises:
        UsageError: No set, two of one name, or a set that its metric cannot score; names the row.
    """
    if not specs:
        raise UsageError(
            "no set with images to ask; write one under `evaluation:` in the recipe, or name a "
            "file: --data FILE --metric exact"
        )
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two sets are called {twice[0]!r}; give each its own name")
    found = []
    for spec in specs:
        if spec.modality != "image":
            raise UsageError(f"set {spec.name!r} is of text; ask it with --text")
        items = read_items(spec, root)
        if spec.metric != "choice":
            measure_answers(spec, items, [""] * len(items))  # refuses what it could not score
        prior = None
        if "prior" in spec.blind and spec.train is not None:
            prior = measure_prior(spec, items, read_training_answers(spec, root))
        elif "prior" in spec.blind:
            announce(f"{spec.name}: no training rows (train: FILE), so no prior score")
        found.append(VisionSet(spec, data_file(spec, root), items, prior))
    return found


def evaluate_vision(
    answerer: Answerer,
    run: Path,
    specs: Sequence[SetSpec],
    *,
    workflow: str | None = None,
    batch_size: int = BATCH_SIZE,
    root: Path | None = None,
    announce: Announce = lambda text: None,
    progress: Progress = lambda done, total: None,
) -> Results:
    """Ask sets with images, and score the answers by each set's metric.

    Goes on where a killed run stopped: predictions lie in `results/predictions/` of the run, one
    file for the answers and one for those without the image, and no question is asked twice.

    Args:
        answerer: The graft.
        run: Its folder.
        specs: The sets.
        workflow: Of all rows with images, unless a set names its own; default: the graft's.
        batch_size: Questions at a time.
        root: What relative paths of sets start from.
        announce: Told in sentences what is done.
        progress: Told how many questions of a set are answered, and of how many.

    Returns:
        Section `vision`; not yet written.

    Raises:
        UsageError: See :func:`read_vision_sets`; a graft without the workflow.
        MMGraftError: The disk is full; what was answered is kept.
    """
    sets = read_vision_sets(specs, root, announce)
    for each in sets:
        _seeing(answerer.model, each.spec, workflow)
    graft = described_graft(answerer.model, run, workflow)
    kept = KeptAnswers(
        answerer.model, answerer.processor, run, graft, batch_size, announce, progress
    )
    eye = _Eye(kept, announce)
    return Results(
        section="vision",
        mmgraft_version=__version__,
        versions=software(),
        graft=graft,
        sets=[eye.evaluate(each, _seeing(answerer.model, each.spec, workflow)) for each in sets],
    )


def without_images(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation, its image parts left out; nothing stands in for them."""
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
    """The workflow of a set.

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


def _seeing(model: GraftedModel, spec: SetSpec, workflow: str | None) -> str:
    return seeing_workflow(spec, workflow, model.default_workflow, model.names)


@dataclass(frozen=True)
class _Eye:
    """A graft that is asked set after set."""

    kept: KeptAnswers
    announce: Announce

    def evaluate(self, each: VisionSet, workflow: str) -> SetResult:
        spec, items = each.spec, each.items
        start = time.monotonic()
        features = run_features(self.kept.model, self.kept.run, items, self.announce)
        self.announce(f"{spec.name}: {len(items)} questions")
        measured = self._measured(each, workflow, features)
        groups = groups_of(items)
        blind = {}
        if each.prior is not None:
            blind["prior"] = as_scores(each.prior.scores(groups))
        blindly = blind_workflow(self.kept.model, workflow)
        if NO_IMAGE in spec.blind:
            self.announce(f"{spec.name}: the same questions without their images")
            blind[NO_IMAGE] = as_scores(self._measured(each, blindly, blind=True).scores(groups))
        settings = {
            "workflow": workflow,
            "no_image_workflow": blindly if NO_IMAGE in spec.blind else None,
            "max_new_tokens": _tokens(spec),
            "batch_size": self.kept.batch_size,
            "prompt": spec.prompt,
            "boxes": spec.boxes,
            "limit": spec.limit,
            "seed": spec.seed if spec.limit is not None else None,
            "train": None if spec.train is None else Path(spec.train).name,
            **self.kept.numbers,
        }
        return SetResult(
            name=spec.name,
            metric=spec.metric,
            main=measured.main,
            file=each.file.name,
            sha256=file_sha256(each.file),
            items=len(items),
            scores=as_scores(measured.scores(groups)),
            blind=blind,
            kinds=scores_by_kind(measured, items),
            settings={name: value for name, value in settings.items() if value is not None},
            predictions=self.kept.file(spec.name).relative_to(self.kept.run).as_posix(),
            sheet=self._sheet(each) if spec.metric == "box" else None,
            seconds=time.monotonic() - start,
        )

    def _sheet(self, each: VisionSet) -> str | None:
        """The contact sheet of boxes, from the answers that were kept."""
        rows = read_predictions(self.kept.file(each.spec.name))
        said = {str(row["id"]): str(row["answer"]) for row in rows}
        answers = [said[item.id] for item in each.items]
        return write_box_sheet(self.kept.run, each.spec, each.file, each.items, answers)

    def _measured(
        self,
        each: VisionSet,
        workflow: str,
        features: Features | None = None,
        blind: bool = False,
    ) -> Measured:
        """Ask a set, with or without its images, and score it."""
        spec, items = each.spec, each.items
        if blind:
            items = [replace(item, messages=without_images(item.messages)) for item in items]
        name = f"{spec.name}.{NO_IMAGE}" if blind else spec.name
        if spec.metric == "choice":
            scores = self.kept.choices(
                name, items, workflow, letters=shows_options(spec.prompt), features=features
            )
            return measure_choices(items, scores)
        return measure_answers(
            spec, items, self.kept.answers(name, items, workflow, _tokens(spec) or 0, features)
        )


def _tokens(spec: SetSpec) -> int | None:
    if spec.metric == "choice":
        return None
    return spec.max_new_tokens or ANSWER_TOKENS[spec.metric]
