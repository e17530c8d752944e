"""`mmgraft eval`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmgraft.cli.options import (
    BaseOption,
    DeviceOption,
    DryRunFlag,
    DtypeOption,
    JsonFlag,
    QuantizationOption,
    VerifyOption,
)

if TYPE_CHECKING:
    from mmgraft.recipes.evaluation_set import SetSpec
    from mmgraft.runs.results import Results, SetResult

_SETS, _ONE = "Which sets", "A set without a recipe"
_EVERY = 5.0  # seconds between two lines of progress


def evaluate(
    run: Annotated[
        str | None, typer.Argument(help="Folder of a graft; default: the one here.")
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Is text as it was? Also sets of text.")
    ] = False,
    vision: Annotated[bool, typer.Option("--vision", help="Ask sets with images.")] = False,
    iit: Annotated[
        bool, typer.Option("--iit", help="Ask dialogues of text and images in six shapes.")
    ] = False,
    harness: Annotated[
        str | None,
        typer.Option("--harness", help="Tasks of lm-evaluation-harness: NAME[,NAME]."),
    ] = None,
    sets: Annotated[
        str | None,
        typer.Option(
            "--sets",
            help="YAML with `evaluation:`; default: the run's recipe.",
            rich_help_panel=_SETS,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Ask this set; may be repeated.", rich_help_panel=_SETS),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Items of each set, drawn.", rich_help_panel=_SETS),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="File of items, or a packaged set.", rich_help_panel=_ONE),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="exact, vqa, vqa_v2, choice, yes_no, caption, box or perplexity.",
            rich_help_panel=_ONE,
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option("--images", help="Folder that image paths start from.", rich_help_panel=_ONE),
    ] = None,
    train_rows: Annotated[
        str | None,
        typer.Option("--train", help="Training rows, for the prior.", rich_help_panel=_ONE),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Default: the file's.", rich_help_panel=_ONE)
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", help="What is asked, with {question}, {options}.", rich_help_panel=_ONE
        ),
    ] = None,
    boxes: Annotated[
        str | None,
        typer.Option("--boxes", help="unit, thousand, ten or pixel.", rich_help_panel=_ONE),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column", help="FIELD=KEY of the rows; may be repeated.", rich_help_panel=_ONE
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder of harness tasks of your own.")
    ] = None,
    dialogues: Annotated[
        Path | None, typer.Option("--dialogues", help="Dialogues that were saved before.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--dialogue-count", min=1, help="Dialogues of each shape.")
    ] = None,
    untouched: Annotated[
        str | None, typer.Option("--untouched", help="The base that text is compared with.")
    ] = None,
    workflow: Annotated[
        str | None, typer.Option("--workflow", help="Of rows with images; default: the graft's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Questions at a time.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    base: BaseOption = None,
    verify: VerifyOption = "fast",
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Measure what a graft keeps of text and what it sees, each number with its interval.

    Results and a report go into the run's results/. After a kill the same command goes on:
    no question is asked twice.
    """
    from mmgraft.cli.console import note, print_json
    from mmgraft.evaluation.measuring import Asked, check, measure
    from mmgraft.runs.find import find_run

    folder = find_run(run, announce=note)
    one = {
        "images": images, "train": train_rows, "name": name, "prompt": prompt, "boxes": boxes,
        "columns": _columns(columns),
    }  # fmt: skip
    asked = Asked(
        run=folder,
        specs=tuple(_specs(folder, sets, data, metric, one, only or (), limit, text)),
        text=text,
        vision=vision,
        iit=iit,
        tasks=_listed(harness),
        workflow=workflow,
        batch_size=batch_size,
        limit=limit,
        include_path=include_path,
        dialogues=dialogues,
        dialogue_count=count,
        untouched=untouched,
    )
    asked = asked.with_parts_of_sets() if data is not None else asked
    plan = check(asked)
    if dry_run:
        if json:
            print_json({"run": str(folder), "measures": plan})
        else:
            for part, what in plan.items():
                note(f"would measure {part}: {', '.join(map(str, what)) or 'no set'}")
        return
    from mmgraft.cli.loading import load_answerer

    answerer = load_answerer(str(folder), device, dtype, quantization, base, verify, None)
    measured = list(measure(answerer, asked, announce=note, progress=_progress(note)))
    from mmgraft.evaluation.report.report import write_report

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


# -- what is asked ------------------------------------------------------------------------------


def _specs(
    run: Path,
    sets: str | None,
    data: str | None,
    metric: str | None,
    one: dict[str, Any],
    only: Sequence[str],
    limit: int | None,
    text: bool,
) -> list[SetSpec]:
    """The sets that are meant: one of `--data`, else some of a file's or of the run's recipe."""
    from mmgraft.errors import UsageError
    from mmgraft.evaluation.items.packaged_text import PACKAGED
    from mmgraft.evaluation.items.set_files import choose_sets, given_set, load_sets, run_sets

    if data is None:
        if metric is not None or any(value is not None for value in one.values()):
            raise UsageError(
                "--metric, --images, --train, --name, --prompt, --boxes and --column are of a set "
                "named by --data FILE; give it, or write them into a file for --sets"
            )
        return choose_sets(run_sets(run) if sets is None else load_sets(sets), only, limit)
    if sets is not None or only:
        raise UsageError("--data is one set, --sets and --only choose of several; give one of them")
    if text or data in PACKAGED:
        one = {**one, "modality": "text"}
    return choose_sets([given_set(data, metric, **one)], (), limit)


def _columns(given: Sequence[str] | None) -> dict[str, str] | None:
    from mmgraft.errors import UsageError

    if not given:
        return None
    pairs = [text.partition("=") for text in given]
    for field, equals, key in pairs:
        if not (field and equals and key):
            raise UsageError(f"--column {field}{equals}{key}: write FIELD=KEY, as answer=label")
    return {field: key for field, _, key in pairs}


def _listed(names: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (names or "").split(",") if name.strip())


# -- what is shown ------------------------------------------------------------------------------


def _progress(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Says how far a set is, every few seconds, and how fast it goes."""
    start = last = time.monotonic()
    first = 0

    def told(done: int, total: int) -> None:
        nonlocal start, last, first
        now = time.monotonic()
        if done <= first or first == 0:
            start, first = now, done
        if now - last >= _EVERY or done == total:
            last = now
            rate = (done - first) / (now - start) if now > start else 0
            say(f"{done} of {total}" + (f", {rate:.1f} a second" if rate else ""))
        if done == total:
            first = 0

    return told


def _show(results: Results) -> None:
    """The main score of every set beside what it is compared with."""
    from mmgraft.cli.console import stdout, table

    out = stdout()
    if results.identity is not None:
        same = "identical, bit for bit" if results.identity["identical"] else "changed"
        out.print(f"text against the untouched base: {same}", markup=False)
    if not results.sets:
        return
    others = ["base", "change", "prior", "no_image"]
    rows = [
        [one.name, one.metric, one.items, one.main, str(one.scores[one.main]), *_beside(one)]
        for one in results.sets
    ]
    used = [at for at in range(len(others)) if any(row[5 + at] for row in rows)]
    shown = [[*row[:5], *(row[5 + at] for at in used)] for row in rows]
    columns = ["set", "metric", "items", "score", "graft", *(others[at] for at in used)]
    out.print(table(columns, shown, title=results.section))


def _beside(one: SetResult) -> list[str]:
    found = [one.base, one.change, one.blind.get("prior", {}), one.blind.get("no_image", {})]
    return [str(scores[one.main]) if one.main in scores else "" for scores in found]
