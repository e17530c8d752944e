"""`mmgraft laws`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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
    RevisionOption,
    VerifyOption,
)

if TYPE_CHECKING:
    from mmgraft.recipes.evaluation_set import SetSpec
    from mmgraft.runs.results import Results

JSON_NAME, PNG_NAME = "laws.json", "laws.png"


def laws(
    run: Annotated[str, typer.Argument(help="Folder or Hub id of a graft.")],
    rows: Annotated[
        Path | None,
        typer.Argument(help="Messages jsonl or LLaVA json; else a set of the run's recipe."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder that image paths start from.")
    ] = None,
    set_name: Annotated[
        str | None,
        typer.Option("--set", help="A set of the recipe's `evaluation`; default: its first."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Draw so many rows.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Of that draw.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help=f"Folder for {JSON_NAME} and {PNG_NAME}; else RUN/results."),
    ] = None,
    workflow: Annotated[
        str | None, typer.Option("--workflow", help="Default: the graft's.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Rows run together, of like length.")
    ] = 8,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    base: BaseOption = None,
    verify: VerifyOption = "fast",
    revision: RevisionOption = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Show how much each layer attends to the image and to the text around it.

    Measured with the graft out of the path and in it. The attention shift is one minus the
    correlation over layers of the attention to the text before the image with that to the text
    after it (Wings, arXiv 2406.03496). Rows need text on both sides of the image.
    """
    from mmgraft.cli.console import note, print_json, stdout, table
    from mmgraft.errors import UsageError
    from mmgraft.model.files.graft_file import GraftFile
    from mmgraft.model.files.load import graft_folder

    if rows is not None and set_name is not None:
        raise UsageError("give a file of rows or --set, not both")
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    folder, local = graft_folder(run, revision), Path(run).is_dir()
    if out is None and not local:
        raise UsageError(f"{run} is on the Hub, where nothing is written; give --out FOLDER")
    GraftFile.read(folder)
    name, file, samples = _samples(folder, rows, images, set_name, limit, seed)
    target = out or folder / "results"
    if dry_run:
        note(f"would measure {len(samples)} rows of {file} and write {target / JSON_NAME}")
        return

    from mmgraft.atomic import atomic_json, atomic_write
    from mmgraft.cli.loading import load_answerer
    from mmgraft.evaluation.attention.laws import evaluate_laws
    from mmgraft.evaluation.report.plots import laws_plot
    from mmgraft.runs.sections import put_aside

    answerer = load_answerer(run, device, dtype, quantization, base, verify, revision)
    results = evaluate_laws(
        answerer,
        samples,
        folder,
        file=file,
        name=name,
        workflow=workflow,
        batch_size=batch_size,
        settings={"limit": limit, "seed": seed},
        announce=note,
        progress=lambda done, total: note(f"{done} of {total} rows"),
    )
    picture = laws_plot({folder.resolve().name if local else run: results})
    target.mkdir(parents=True, exist_ok=True)
    for path in put_aside(folder, results) if out is None else ():
        note(f"results of the graft as it was before are {path.name} now")
    atomic_write(target / PNG_NAME, partial(_put, picture))
    atomic_json(target / JSON_NAME, results.model_dump(mode="json"))
    if json:
        print_json(results.model_dump(mode="json"))
        return
    stdout().print(table(["summed over", "attention shift", "change"], _table(results)))
    left_out = results.details[name]["left_out"]
    note(_told(left_out) + f"wrote {target / JSON_NAME} and {PNG_NAME}")


def _put(picture: bytes, path: Path) -> None:
    path.write_bytes(picture)


def _samples(
    folder: Path,
    rows: Path | None,
    images: Path | None,
    set_name: str | None,
    limit: int,
    seed: int,
) -> tuple[str, Path, Sequence[Any]]:
    """Name, file and samples: those of a file, or of a set of the recipe."""
    from mmgraft.errors import UsageError
    from mmgraft.evaluation.attention.laws import read_samples

    if rows is not None:
        return rows.stem, rows, read_samples(rows, images, limit, seed)
    from mmgraft.evaluation.items.files import data_file, read_items

    spec = _set(folder, set_name)
    if images is not None:
        spec = spec.model_copy(update={"images": str(images)})
    if spec.limit is None or limit < spec.limit:
        spec = spec.model_copy(update={"limit": limit, "seed": seed})
    found = read_items(spec)
    if not any(item.has_image for item in found):
        raise UsageError(f"set {spec.name!r} shows no images; give rows that do")
    return spec.name, data_file(spec), found


def _set(folder: Path, name: str | None) -> SetSpec:
    """A set with images of the recipe that the run was trained by.

    Raises:
        UsageError: The run has no recipe, or its recipe no such set.
    """
    from mmgraft.errors import UsageError, did_you_mean
    from mmgraft.evaluation.items.set_files import run_sets

    sets = {one.name: one for one in run_sets(folder)}
    shown = {key: one for key, one in sets.items() if one.modality == "image"}
    if not shown:
        raise UsageError(
            f"the recipe of {folder} names no set with images under `evaluation`; give a file of "
            f"rows: mmgraft laws {folder} ROWS.jsonl"
        )
    if name is None:
        return next(iter(shown.values()))
    if name not in shown:
        if name in sets:
            raise UsageError(f"set {name!r} is of text alone; choose {', '.join(shown)}")
        raise UsageError(f"the recipe has no set {name!r}; {did_you_mean(name, shown)}")
    return shown[name]


def _table(results: Results) -> list[list[str]]:
    (one,) = results.sets
    rows = []
    for name, score in one.scores.items():
        change = one.change.get(name)
        told = "" if change is None else f"{change.value:+.3f} ({change.low:+.3f} to "
        told += "" if change is None else f"{change.high:+.3f})"
        rows.append([name.removeprefix("shift_").replace("_", " "), str(score), told])
    return rows


def _told(left_out: dict[str, int]) -> str:
    told = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    return f"left out: {told.replace('_', ' ')}; " if told else ""
