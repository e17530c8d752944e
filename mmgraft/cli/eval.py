"""``mmgraft eval``."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

from mmgraft.cli.console import note, print_json, stdout, table
from mmgraft.cli.options import LOADING, DryRunFlag, JsonFlag, argument, option, with_options
from mmgraft.errors import UsageError

if TYPE_CHECKING:
    from mmgraft.evaluation.evaluate import Evaluation
    from mmgraft.inference import Answerer
    from mmgraft.recipes.evaluation_set import SetSpec
    from mmgraft.runs.results import Results

#: Options that :class:`Evaluation` has by the same names.
_PASSED_ON = (
    "text", "vision", "iit", "workflow", "batch_size", "limit", "include_path", "dialogues",
    "dialogue_count", "untouched",
)  # fmt: skip
_sets = partial(option, panel="Which sets")
_one = partial(option, panel="A set without a recipe")


@with_options("dry_run", LOADING, without="revision")
def evaluate(
    run: Annotated[str | None, argument("Folder of a graft; default: the one here.")] = None,
    text: Annotated[bool, option("--text", "Compare text with the base; sets of text.")] = False,
    vision: Annotated[bool, option("--vision", "Evaluate sets with images.")] = False,
    iit: Annotated[bool, option("--iit", "Dialogues of text and images in six shapes.")] = False,
    harness: Annotated[str | None, option("Tasks of lm-evaluation-harness: NAME[,NAME].")] = None,
    sets: Annotated[str | None, _sets("YAML with `evaluation:`; else the run's recipe.")] = None,
    only: Annotated[list[str] | None, _sets("Evaluate this set; may be repeated.")] = None,
    limit: Annotated[int | None, _sets("Sample so many items of each set.", min=1)] = None,
    data: Annotated[
        str | None, _one("Items: a file, shards, hub:OWNER/NAME, a packaged set.")
    ] = None,
    metric: Annotated[
        str | None, _one("Metric: exact, vqa, vqa_v2, choice, yes_no, caption, box or perplexity.")
    ] = None,
    images: Annotated[str | None, _one("Folder that image paths start from.")] = None,
    train: Annotated[str | None, _one("Training rows, for the prior.")] = None,
    name: Annotated[str | None, _one("Name of the set; default: the file's.")] = None,
    prompt: Annotated[str | None, _one("Prompt, with {question} and {options}.")] = None,
    boxes: Annotated[
        str | None, _one("Boxes in answers: unit, thousand, ten, pixel, cogvlm or qwen.")
    ] = None,
    column: Annotated[list[str] | None, _one("FIELD=KEY of the rows; may be repeated.")] = None,
    read: Annotated[list[str] | None, _one("Key of a set: split=test; may be repeated.")] = None,
    include_path: Annotated[Path | None, option("Folder of harness tasks of your own.")] = None,
    dialogues: Annotated[Path | None, option("Dialogues that were saved before.")] = None,
    dialogue_count: Annotated[int | None, option("Dialogues of each shape.", min=1)] = None,
    untouched: Annotated[str | None, option("The base that text is compared with.")] = None,
    workflow: Annotated[
        str | None, option("Workflow of rows with images; default: the graft's.")
    ] = None,
    batch_size: Annotated[int | None, option("Questions a batch.", min=1)] = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
    **loading: Any,
) -> None:
    """Measure what a graft keeps of text and what it sees, each number with its interval.

    Results and a report go into the run's results/. After a kill the same command goes on:
    no question is answered twice.
    """
    _evaluate(SimpleNamespace(**locals()))


def _evaluate(given: Any) -> None:
    """Check what was given, load the graft and measure it."""
    from mmgraft.evaluation.evaluate import Evaluation, check
    from mmgraft.runs.find import find_run

    folder = find_run(given.run)
    named = {key: getattr(given, key) for key in _PASSED_ON}
    tasks = tuple(filter(None, map(str.strip, (given.harness or "").split(","))))
    evaluation = Evaluation(folder, tuple(_specs(folder, given)), tasks=tasks, **named)
    if given.data is not None:
        evaluation = evaluation.with_parts_of_sets()
    plan = check(evaluation)
    if given.dry_run:
        _show_plan(folder, plan, given.json)
        return
    from mmgraft.cli.loading import load_answerer

    _run(load_answerer(str(folder), revision=None, **given.loading), evaluation, given.json)


def _run(answerer: "Answerer", evaluation: "Evaluation", json: bool) -> None:
    from mmgraft.evaluation.evaluate import evaluate_run
    from mmgraft.evaluation.report.report import write_report
    from mmgraft.progress import working

    folder = evaluation.run
    with working("evaluating"):
        measured = list(evaluate_run(answerer, evaluation))
    report = write_report(folder)
    if json:
        print_json(
            {
                "run": str(folder),
                "sections": {one.section: one.model_dump(mode="json") for one in measured},
                "report": {kind: str(path) for kind, path in report.items()},
            }
        )
        return
    for results in measured:
        _show(results)
    for path in report.values():
        note(f"wrote {path}")


# -- which sets ---------------------------------------------------------------------------------


def _specs(run: Path, given: Any) -> "list[SetSpec]":
    """Return the set of ``--data``, else sets of a file or of the run's recipe."""
    from mmgraft.evaluation.items.files import PACKAGED
    from mmgraft.evaluation.sets import choose_sets, given_set, load_sets, run_sets
    from mmgraft.recipes.source import key_value

    keys = ("images", "train", "name", "prompt", "boxes", "metric")
    one: dict[str, Any] = {key: getattr(given, key) for key in keys}
    one["columns"] = _columns(given.column)
    one |= dict(key_value(text, "--read", "split=test") for text in given.read or ())
    only = given.only or ()
    if given.data is None:
        if any(value is not None for value in one.values()):
            raise UsageError(
                "--metric, --images, --train, --name, --prompt, --boxes, --column and --read are "
                "of a set named by --data FILE; give it, or write them into a file for --sets"
            )
        sets = run_sets(run) if given.sets is None else load_sets(given.sets)
        return choose_sets(sets, only, given.limit)
    if given.sets is not None or only:
        raise UsageError("--data is one set, --sets and --only choose of several; give one of them")
    modality = "text" if given.text or given.data in PACKAGED else None
    return choose_sets([given_set(given.data, modality=modality, **one)], (), given.limit)


def _columns(given: Sequence[str] | None) -> dict[str, str] | None:
    if not given:
        return None
    pairs = [text.partition("=") for text in given]
    for field, equals, key in pairs:
        if not (field and equals and key):
            raise UsageError(f"--column {field}{equals}{key}: write FIELD=KEY, as answer=label")
    return {field: key for field, _, key in pairs}


# -- what is shown ------------------------------------------------------------------------------


def _show_plan(folder: Path, plan: dict[str, list[str]], json: bool) -> None:
    if json:
        print_json({"run": str(folder), "measures": plan})
        return
    for part, what in plan.items():
        note(f"would measure {part}: {', '.join(map(str, what)) or 'no set'}")


def _show(results: "Results") -> None:
    """Show the main score of every set beside what it is compared with."""
    from mmgraft.evaluation.report.score_tables import WHERE

    out = stdout()
    if results.identity is not None:
        same = "identical, bit for bit" if results.identity["identical"] else "changed"
        out.print(f"text against the untouched base: {same}", markup=False)
        for level, one in results.identity.get("levels", {}).items():
            same = "identical, bit for bit" if one["identical"] else "changed"
            out.print(f"{level}, text {WHERE[level]}: {same}", markup=False)
    if not results.sets:
        return
    found = [(one, {"base": one.base, "change": one.change, **one.blind}) for one in results.sets]
    names = ("base", "change", "prior", "no_image")
    used = [name for name in names if any(one.main in more.get(name, {}) for one, more in found)]
    rows = [
        [one.name, one.metric, one.items, one.main, str(one.scores[one.main])]
        + [str(more.get(name, {}).get(one.main, "")) for name in used]
        for one, more in found
    ]
    columns = ["set", "metric", "items", "score", "graft", *used]
    out.print(table(columns, rows, title=results.section))
