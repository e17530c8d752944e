"""Everything that is asked of one run: each part as a section of its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.errors import UsageError
from mmgraft.recipes.evaluation_set import SetSpec, dialogue_sets

if TYPE_CHECKING:
    from mmgraft.inference import Answerer
    from mmgraft.runs.results import Results, Section

Announce = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Asked:
    """What is measured of a run.

    Attributes:
        run: Its folder.
        specs: Sets of text and with images; each part takes its own.
        text: Compare text with the untouched base, and ask the sets of text.
        vision: Ask the sets with images.
        iit: Ask dialogues that are built of the multiple-choice sets.
        tasks: Tasks of lm-evaluation-harness.
        workflow: Of rows with images; None: the graft's.
        batch_size: Questions at a time; None leaves it to each part.
        limit: Documents of each task of the harness.
        include_path: Folder of further tasks for the harness.
        dialogues: Dialogues that were saved before, instead of new ones.
        dialogue_count: Dialogues of each shape; None: the usual number.
        untouched: The base that text is compared with; None: the graft's own.
        root: What relative paths of sets start from; None: the working folder.
    """

    run: Path
    specs: Sequence[SetSpec] = ()
    text: bool = False
    vision: bool = False
    iit: bool = False
    tasks: Sequence[str] = ()
    workflow: str | None = None
    batch_size: int | None = None
    limit: int | None = None
    include_path: Path | None = None
    dialogues: Path | None = None
    dialogue_count: int | None = None
    untouched: str | None = None
    root: Path | None = None

    def of(self, modality: str) -> list[SetSpec]:
        """The sets of text, or those with images."""
        return [spec for spec in self.specs if spec.modality == modality]

    @property
    def choices(self) -> list[SetSpec]:
        """What dialogues are built of."""
        return dialogue_sets(self.specs)

    def with_parts_of_sets(self) -> Asked:
        """The parts that the sets belong to, where none is named."""
        if self.text or self.vision or self.iit:
            return self
        return replace(self, text=bool(self.of("text")), vision=bool(self.of("image")))

    def sizes(self) -> dict[str, Any]:
        """The batch size, where it is not left to a part."""
        return {} if self.batch_size is None else {"batch_size": self.batch_size}


def check(asked: Asked) -> dict[str, list[str]]:
    """Read every set that will be asked, before a model is loaded.

    Returns:
        Each part with what it asks: "test (1000 items)".

    Raises:
        UsageError: Nothing is asked; a set that cannot be asked, named with file and row; a package
            that is missing; a task that is unknown; a workflow that the graft does not have.
    """
    plan: dict[str, list[str]] = {}
    if asked.text:
        from mmgraft.evaluation.text import read_text_sets

        found = read_text_sets(asked.of("text"), asked.root)
        plan["text"] = ["identity", *(_named(each.spec, len(each.items)) for each in found)]
    if asked.vision:
        from mmgraft.evaluation.vision import read_vision_sets

        seen = read_vision_sets(asked.of("image"), asked.root)
        plan["vision"] = [_named(each.spec, len(each.items)) for each in seen]
    if asked.iit:
        if not asked.choices and asked.dialogues is None:
            raise UsageError(
                "dialogues are built of multiple choice, with and without images, and no set has "
                "the metric choice; write some under `evaluation:`, or name saved ones: "
                "--dialogues FOLDER"
            )
        named = [str(asked.dialogues)] if asked.dialogues else [one.name for one in asked.choices]
        _read_dialogues(asked)
        plan["iit"] = named
    if asked.tasks:
        from mmgraft.evaluation.lm_eval.harness import require_tasks

        require_tasks(asked.tasks, asked.include_path)
        plan["harness"] = list(asked.tasks)
    if not plan:
        raise UsageError(
            "say what to measure: --text, --vision, --iit, --harness TASK, or a set: --data FILE "
            "--metric exact"
        )
    _refuse_workflows(asked)
    return plan


def _read_dialogues(asked: Asked) -> None:
    """Read what dialogues are made of, or saved ones, so that their mistakes are told."""
    from mmgraft.evaluation.dialogues.files import read_dialogues
    from mmgraft.evaluation.items.files import read_items

    if asked.dialogues is not None:
        read_dialogues(asked.dialogues)
        return
    for spec in asked.choices:
        read_items(spec, asked.root)


def _refuse_workflows(asked: Asked) -> None:
    """Refuse a workflow that the graft's record does not have.

    Raises:
        UsageError: It is named.
    """
    from mmgraft.evaluation.vision import seeing_workflow
    from mmgraft.model.files.graft_file import GraftFile
    from mmgraft.model.workflow import TEXT_WORKFLOW

    own = GraftFile.read(asked.run).workflow
    for spec in asked.of("image") if asked.vision else ():
        seeing_workflow(spec, asked.workflow, own, [own])
    allowed = {None, own} if asked.iit else {None, own, TEXT_WORKFLOW}
    if (asked.iit or asked.tasks) and asked.workflow not in allowed:
        raise UsageError(f"workflow {asked.workflow!r} is not there; this graft has: {own}")


def _named(spec: SetSpec, items: int) -> str:
    return f"{spec.name} ({spec.metric}, {items} items)"


def measure(
    answerer: Answerer,
    asked: Asked,
    announce: Announce = lambda text: None,
    progress: Progress = lambda done, total: None,
) -> Iterator[Results]:
    """Measure part after part; each is written into the run as it ends.

    Args:
        answerer: The run, loaded.
        asked: What is measured; see :func:`check`.
        announce: Told in sentences what is done.
        progress: Told how many questions of a set are answered, and of how many.

    Yields:
        The section of each part, with what was measured now alone.

    Raises:
        UsageError: A set that cannot be asked, or a workflow that the graft does not have.
        MMGraftError: The disk is full; what was measured is kept.
    """
    from mmgraft.runs.sections import put_aside, save_sets

    told: dict[str, Any] = {"announce": announce, "progress": progress, "root": asked.root}
    parts: list[tuple[bool, Callable[[], list[Results]]]] = [
        (asked.text, lambda: [_text(answerer, asked, told)]),
        (asked.vision, lambda: [_vision(answerer, asked, told)]),
        (asked.iit, lambda: [_iit(answerer, asked, told)]),
        (bool(asked.tasks), lambda: _harness(answerer, asked, announce)),
    ]
    for wanted, part in parts:
        for results in part() if wanted else ():
            for path in put_aside(asked.run, results):
                announce(f"results of the graft as it was before are {path.name} now")
            save_sets(asked.run, results)
            yield results


def _text(answerer: Answerer, asked: Asked, told: dict[str, Any]) -> Results:
    from mmgraft.evaluation.text import evaluate_text

    return evaluate_text(
        answerer,
        asked.run,
        asked.of("text"),
        untouched=asked.untouched,
        **asked.sizes(),
        **told,
    )


def _vision(answerer: Answerer, asked: Asked, told: dict[str, Any]) -> Results:
    from mmgraft.evaluation.vision import evaluate_vision

    return evaluate_vision(
        answerer,
        asked.run,
        asked.of("image"),
        workflow=asked.workflow,
        **asked.sizes(),
        **told,
    )


def _iit(answerer: Answerer, asked: Asked, told: dict[str, Any]) -> Results:
    from mmgraft.evaluation.dialogues.evaluate import evaluate_iit

    counts = {} if asked.dialogue_count is None else {"count": asked.dialogue_count}
    return evaluate_iit(
        answerer,
        asked.run,
        asked.choices,
        dialogues=asked.dialogues,
        workflow=asked.workflow,
        **counts,
        **asked.sizes(),
        **told,
    )


def _harness(answerer: Answerer, asked: Asked, announce: Announce) -> list[Results]:
    """Tasks of text go into the section `text`, those with images into `vision`."""
    from mmgraft import __version__
    from mmgraft.evaluation.lm_eval.harness import evaluate_harness
    from mmgraft.evaluation.origin import described_graft, software
    from mmgraft.evaluation.untouched import base_trained, untouched_base
    from mmgraft.model.workflow import TEXT_WORKFLOW
    from mmgraft.runs.results import Results

    model = answerer.model
    base = untouched_base(model, asked.run, asked.untouched) if base_trained(model) else None
    sets = evaluate_harness(
        answerer,
        list(asked.tasks),
        workflow=asked.workflow,
        limit=asked.limit,
        include_path=asked.include_path,
        untouched=None if base is None else base.model,
        announce=announce,
        **asked.sizes(),
    )
    own = None if asked.workflow == TEXT_WORKFLOW else asked.workflow  # text is the base alone
    sections: dict[Section, list[Any]] = {"text": [], "vision": []}
    for one in sets:
        section = "text" if one.settings.get("workflow") == TEXT_WORKFLOW else "vision"
        sections[section].append(one)
    return [
        Results(
            section=section,
            mmgraft_version=__version__,
            versions=software("lm-eval"),
            graft=described_graft(model, asked.run, own),
            sets=found,
        )
        for section, found in sections.items()
        if found
    ]
