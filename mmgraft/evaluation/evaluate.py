"""Everything that is evaluated of one run: each part as a section of its results."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.progress import say
from mmgraft.recipes.evaluation_set import SetSpec, dialogue_sets

if TYPE_CHECKING:
    from mmgraft.inference import Answerer
    from mmgraft.runs.results import Results, Section


class Evaluation(Frozen):
    """Selection of what to evaluate of a run.

    Attributes:
        run: Its folder.
        specs: Sets of text and with images; each part takes its own.
        text: Compare text with the untouched base, and evaluate the sets of text.
        vision: Evaluate the sets with images.
        iit: Evaluate dialogues that are built from the multiple-choice sets.
        tasks: Tasks of lm-evaluation-harness.
        workflow: Of rows with images; None: the graft's.
        batch_size: Questions a batch; None leaves it to each part.
        limit: Documents of each task of the harness.
        include_path: Folder of further tasks for the harness.
        dialogues: Dialogues that were saved before, instead of new ones.
        dialogue_count: Dialogues of each shape; None: the usual number.
        untouched: The base that text is compared with; None: the graft's own.
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

    def of(self, modality: str) -> list[SetSpec]:
        """Return the sets of text, or those with images."""
        return [spec for spec in self.specs if spec.modality == modality]

    @property
    def batch(self) -> dict[str, Any]:
        """The size of a batch by its name, where one was chosen."""
        return {} if self.batch_size is None else {"batch_size": self.batch_size}

    def with_parts_of_sets(self) -> "Evaluation":
        """Return it with the parts that the sets belong to, where none is named."""
        if self.text or self.vision or self.iit:
            return self
        return replace(self, text=bool(self.of("text")), vision=bool(self.of("image")))


def check(evaluation: Evaluation) -> dict[str, list[str]]:
    """Read every set that will be evaluated, before a model is loaded.

    Returns:
        Each part with its sets: "test (choice, 1000 items)".

    Raises:
        UsageError: Nothing to evaluate; a set that cannot be evaluated, named with file and row; a
            package that is missing; a task that is unknown; a workflow that the graft does not
            have.
    """
    from mmgraft.evaluation.sets import read_sets

    plan: dict[str, list[str]] = {}
    if evaluation.text:
        plan["text"] = ["identity", *map(_named, read_sets(evaluation.of("text"), "text"))]
    if evaluation.vision:
        plan["vision"] = list(map(_named, read_sets(evaluation.of("image"), "image")))
    if evaluation.iit:
        plan["iit"] = _read_dialogues(evaluation)
    if evaluation.tasks:
        from mmgraft.evaluation.lm_eval.harness import require_tasks

        require_tasks(evaluation.tasks, evaluation.include_path)
        plan["harness"] = list(evaluation.tasks)
    if not plan:
        raise UsageError(
            "say what to measure: --text, --vision, --iit, --harness TASK, or a set: --data FILE "
            "--metric exact"
        )
    _refuse_workflows(evaluation)
    return plan


def _named(each: Any) -> str:
    return f"{each.spec.name} ({each.spec.metric}, {len(each.items)} items)"


def _read_dialogues(evaluation: Evaluation) -> list[str]:
    """Read what dialogues are built from, or saved ones, to refuse what is wrong with them."""
    from mmgraft.evaluation.dialogues.dialogues import read_dialogues
    from mmgraft.evaluation.items.files import read_items

    if evaluation.dialogues is not None:
        read_dialogues(evaluation.dialogues)
        return [str(evaluation.dialogues)]
    choices = dialogue_sets(evaluation.specs)
    if not choices:
        raise UsageError(
            "dialogues are built of multiple choice, with and without images, and no set has the "
            "metric choice; write some under `evaluation:`, or name saved ones: --dialogues FOLDER"
        )
    for spec in choices:
        read_items(spec)
    return [spec.name for spec in choices]


def _refuse_workflows(evaluation: Evaluation) -> None:
    """Refuse a workflow that the graft's record does not have.

    Raises:
        UsageError: It is named.
    """
    from mmgraft.evaluation.vision import seeing_workflow
    from mmgraft.model.files.graft_file import GraftFile
    from mmgraft.model.workflow import TEXT_WORKFLOW

    own = GraftFile.read(evaluation.run).workflow
    for spec in evaluation.of("image") if evaluation.vision else ():
        seeing_workflow(spec, evaluation.workflow, own, [own])
    allowed = {None, own} if evaluation.iit else {None, own, TEXT_WORKFLOW}
    if (evaluation.iit or evaluation.tasks) and evaluation.workflow not in allowed:
        raise UsageError(f"workflow {evaluation.workflow!r} is not there; this graft has: {own}")


def evaluate_run(answerer: "Answerer", evaluation: Evaluation) -> "Iterator[Results]":
    """Evaluate part after part; each is written into the run as it ends.

    Args:
        answerer: The run, loaded.
        evaluation: What is evaluated; see :func:`check`.

    Yields:
        The section of each part, with what was measured now alone.

    Raises:
        UsageError: A set that cannot be evaluated, or a workflow that the graft does not have.
        MMGraftError: The disk is full; what was measured is kept.
    """
    from mmgraft.runs.results import put_aside, save_sets

    for results in _sections(answerer, evaluation):
        for path in put_aside(evaluation.run, results):
            say(f"results of the graft as it was before are {path.name} now")
        save_sets(evaluation.run, results)
        yield results


def _sections(answerer: "Answerer", evaluation: Evaluation) -> "Iterator[Results]":
    given, run, workflow = evaluation.batch, evaluation.run, evaluation.workflow
    if evaluation.text:
        from mmgraft.evaluation.text import evaluate_text

        sets, untouched = evaluation.of("text"), evaluation.untouched
        yield evaluate_text(answerer, run, sets, untouched=untouched, **given)
    if evaluation.vision:
        from mmgraft.evaluation.vision import evaluate_vision

        yield evaluate_vision(answerer, run, evaluation.of("image"), workflow=workflow, **given)
    if evaluation.iit:
        from mmgraft.evaluation.dialogues.evaluate import evaluate_iit

        if evaluation.dialogue_count is not None:
            given["count"] = evaluation.dialogue_count
        choices, saved = dialogue_sets(evaluation.specs), evaluation.dialogues
        yield evaluate_iit(answerer, run, choices, dialogues=saved, workflow=workflow, **given)
    if evaluation.tasks:
        yield from _harness(answerer, evaluation)


def _harness(answerer: "Answerer", evaluation: Evaluation) -> "Iterator[Results]":
    """Run tasks: those of text go into the section ``text``, those with images into ``vision``."""
    from mmgraft.evaluation.identity import base_trained, untouched_base
    from mmgraft.evaluation.lm_eval.harness import evaluate_harness
    from mmgraft.evaluation.origin import described_graft, section_of
    from mmgraft.model.workflow import TEXT_WORKFLOW

    model, run, workflow = answerer.model, evaluation.run, evaluation.workflow
    base = untouched_base(model, run, evaluation.untouched) if base_trained(model) else None
    sets = evaluate_harness(
        answerer,
        list(evaluation.tasks),
        workflow=workflow,
        limit=evaluation.limit,
        include_path=evaluation.include_path,
        untouched=None if base is None else base.model,
        **evaluation.batch,
    )
    own = None if workflow == TEXT_WORKFLOW else workflow  # text is the base alone
    graft = described_graft(model, run, own)
    sections: tuple[Section, ...] = ("text", "vision")
    for section in sections:
        is_text = section == "text"
        found = [one for one in sets if (one.settings["workflow"] == TEXT_WORKFLOW) == is_text]
        if found:
            yield section_of(section, graft, found, "lm-eval")
