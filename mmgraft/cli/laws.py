"""``mmgraft laws``."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

from mmgraft.cli import options
from mmgraft.cli.console import note, print_json, stdout, table
from mmgraft.errors import UsageError

if TYPE_CHECKING:
    from mmgraft.recipes.evaluation_set import SetSpec
    from mmgraft.runs.results import Results

JSON_NAME, PNG_NAME = "laws.json", "laws.png"


@options.with_options("dry_run", options.LOADING, without="template_option")
def laws(
    run: Annotated[str, options.argument("Folder or Hub id of a graft.")],
    rows: Annotated[
        Path | None,
        options.argument("Messages jsonl or LLaVA json; else a set of the run's recipe."),
    ] = None,
    images: options.ImagesOption = None,
    set_name: Annotated[
        str | None,
        options.option("--set", "A set of the recipe's `evaluation`; default: its first."),
    ] = None,
    limit: Annotated[int, options.option("Sample so many rows.", min=1)] = 64,
    seed: Annotated[int, options.option("Seed of that sample.")] = 0,
    out: Annotated[
        Path | None, options.option(f"Folder for {JSON_NAME} and {PNG_NAME}; else RUN/results.")
    ] = None,
    workflow: Annotated[
        str | None, options.option("Workflow of all rows; default: the graft's.")
    ] = None,
    batch_size: Annotated[int, options.option("Rows a batch, of like length.", min=1)] = 8,
    dry_run: options.DryRunFlag = False,
    json: options.JsonFlag = False,
    **loading: Any,
) -> None:
    """Show how much each layer attends to the image and to the text around it.

    Measured with the graft out of the path and in it. The attention shift is one minus the
    correlation over layers of the attention to the text before the image with that to the text
    after it (Wings, arXiv 2406.03496). Rows need text on both sides of the image.
    """
    _laws(SimpleNamespace(**locals()))


def _laws(given: Any) -> None:
    """Check what was given, load the graft and measure it."""
    from mmgraft.evaluation.attention.laws import refuse_memory
    from mmgraft.model.files.graft_file import GraftFile
    from mmgraft.model.files.load import graft_folder

    if given.rows is not None and given.set_name is not None:
        raise UsageError("give a file of rows or --set, not both")
    if given.out is not None and given.out.exists() and not given.out.is_dir():
        raise UsageError(f"--out {given.out} is a file; name a folder")
    folder, local = graft_folder(given.run, given.loading["revision"]), Path(given.run).is_dir()
    if given.out is None and not local:
        raise UsageError(f"{given.run} is on the Hub, where nothing is written; give --out FOLDER")
    record = GraftFile.read(folder)
    if given.workflow in (None, record.workflow):
        refuse_memory(record)
    name, file, samples = _samples(folder, given)
    target = given.out or folder / "results"
    if given.dry_run:
        note(f"would measure {len(samples)} rows of {file} and write {target / JSON_NAME}")
        return
    _measure(given, folder, target, name, file, samples)


def _measure(
    given: Any, folder: Path, target: Path, name: str, file: Path, samples: Sequence[Any]
) -> None:
    from mmgraft.atomic import atomic_bytes, atomic_json
    from mmgraft.cli.loading import load_answerer
    from mmgraft.evaluation.attention.laws import evaluate_laws
    from mmgraft.evaluation.report.plots import laws_plot
    from mmgraft.runs.results import put_aside

    answerer = load_answerer(given.run, **given.loading)
    results = evaluate_laws(
        answerer,
        samples,
        folder,
        file=file,
        name=name,
        workflow=given.workflow,
        batch_size=given.batch_size,
        settings={"limit": given.limit, "seed": given.seed},
    )
    plot = laws_plot({folder.resolve().name if Path(given.run).is_dir() else given.run: results})
    target.mkdir(parents=True, exist_ok=True)
    for path in put_aside(folder, results) if given.out is None else ():
        note(f"results of the graft as it was before are {path.name} now")
    atomic_bytes(target / PNG_NAME, plot)
    atomic_json(target / JSON_NAME, results.model_dump(mode="json"))
    _show(results, target, given.json)


def _show(results: "Results", target: Path, json: bool) -> None:
    if json:
        print_json(results.model_dump(mode="json"))
        return
    (one,) = results.sets
    rows = []
    for name, score in one.scores.items():
        shown = ""
        if change := one.change.get(name):
            shown = f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
        rows.append([name.removeprefix("shift_").replace("_", " "), str(score), shown])
    stdout().print(table(["summed over", "attention shift", "change"], rows))
    counts = results.details[one.name]["left_out"].items()
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts if count)
    if left_out:
        note(f"left out: {left_out.replace('_', ' ')}")
    note(f"wrote {target / JSON_NAME} and {PNG_NAME}")


def _samples(folder: Path, given: Any) -> tuple[str, Path, Sequence[Any]]:
    """Return name, file and samples: those of a file, or of a set of the recipe."""
    from mmgraft.evaluation.attention.laws import read_samples

    rows, images, limit, seed = given.rows, given.images, given.limit, given.seed
    if rows is not None:
        return rows.stem, rows, read_samples(rows, images, limit, seed)
    from mmgraft.evaluation.items.files import data_file, read_items

    spec = _set(folder, given.set_name)
    if images is not None:
        spec = spec.model_copy(update={"images": str(images)})
    if spec.limit is None or limit < spec.limit:
        spec = spec.model_copy(update={"limit": limit, "seed": seed})
    found = read_items(spec)
    if not any(item.has_image for item in found):
        raise UsageError(f"set {spec.name!r} shows no images; give rows that do")
    return spec.name, data_file(spec), found


def _set(folder: Path, name: str | None) -> "SetSpec":
    """Return a set with images of the recipe that the run was trained by.

    Raises:
        UsageError: The run has no recipe, or its recipe no such set.
    """
    from mmgraft.evaluation.sets import choose_sets, run_sets

    sets = run_sets(folder)
    shown = [one for one in sets if one.modality == "image"]
    for one in choose_sets(sets, () if name is None else [name]):
        if one in shown:
            return one
    if shown:
        names = ", ".join(one.name for one in shown)
        raise UsageError(f"set {name!r} is of text alone; choose {names}")
    raise UsageError(
        f"the recipe of {folder} names no set with images under `evaluation`; give a file of "
        f"rows: mmgraft laws {folder} ROWS.jsonl"
    )
