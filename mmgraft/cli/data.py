"""``mmgraft data``: sets and models that packages carry, and a look at rows before a training."""

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmgraft.cli.console import note, print_json, refuse_to_overwrite, stdout, table
from mmgraft.cli.options import (
    DryRunFlag,
    ImagesOption,
    JsonFlag,
    OverwriteFlag,
    ReadOption,
    TemplateOption,
    argument,
    given,
    option,
    with_options,
)
from mmgraft.errors import UsageError
from mmgraft.runs.find import find_run, is_graft

if TYPE_CHECKING:
    from mmgraft.data.chat.preview import Preview
    from mmgraft.data.checking import Report
    from mmgraft.demo.packaged import Offer
    from mmgraft.training.views import View

_SHOWN = 10  # bad rows, rows that are cut, and rows that come twice; --json has all

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look at rows as a model sees them; list and write the sets that packages carry.",
)


@app.command("ls", epilog="Example: mmgraft data ls")
def list_data(json: JsonFlag = False) -> None:
    """List what can be prepared, and which packages it is read from."""
    from mmgraft.demo.packaged import offers

    found = offers()
    if json:
        print_json({"data": [_offer_data(offer) for offer in found]})
        return
    rows = [
        [offer.name, offer.kind, offer.licence, "no" if offer.missing else "yes", offer.content]
        for offer in found
    ]
    stdout().print(table(["name", "kind", "licence", "installed", "what it is"], rows))


def _offer_data(offer: "Offer") -> dict[str, Any]:
    kept = {key: getattr(offer, key) for key in ("name", "kind", "content", "licence")}
    packages = [package.name for package in offer.packages]
    return {**kept, "packages": packages, "missing": list(offer.missing)}


@app.command("prepare", epilog="Example: mmgraft data prepare easy-vqa --out easy-vqa")
def prepare(
    name: Annotated[str, argument("A name of `mmgraft data ls`.")],
    out: Annotated[Path | None, option("Folder to write into; ./NAME when not given.")] = None,
    seed: Annotated[int, option("--seed", "Seed of the samples.")] = 0,
    force: OverwriteFlag = False,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Write a packaged set or model to a folder.

    The same seed gives the same files. They stand there whole or not at all.
    """
    from mmgraft.demo import packaged

    target = out.expanduser() if out is not None else Path(name)
    done = packaged.prepare(name, target, seed=seed, force=force, dry_run=dry_run)
    if json:
        print_json(done.as_dict())
        return
    for file in done.files:
        rows = f" ({done.rows[file]:,} rows)" if file in done.rows else ""
        note(f"{'wrote' if done.written else 'would write'} {done.out / file}{rows}")
    if not done.files:
        note(f"would write {done.name} to {done.out}")
    note(f"licence: {done.licence}")


_Target = Annotated[
    Path,
    argument("A file or shards of rows, hub:OWNER/NAME, or a graft's folder.", metavar="ROWS|RUN"),
]


_reads = partial(given, panel="What reads the rows")
_READING = {
    "images": (ImagesOption, None),
    "read": (ReadOption, None),
    "run": _reads(Path, "Run whose settings read the file."),
    "base": _reads(str, "Base whose tokenizer and template read the rows, without a run."),
    "vision": _reads(str, "Vision tower beside --base."),
    "recipe": _reads(str, "Recipe: a YAML file or a shipped name."),
    "stage": _reads(str, "Stage whose rows are read; default: all."),
    "template": _reads(str, "Template: chat, plain or a jinja file."),
    "template_option": (TemplateOption, None),
    "max_length": _reads(int, "Position where rows are cut.", min=8),
}
_Quick = Annotated[bool, option("--quick", "Look at both ends of an image; do not decode it.")]


@app.command("check", epilog="Example: mmgraft data check rows.jsonl --run qwen2-7b-iaa")
@with_options("quick", _READING)
def check(target: _Target, quick: _Quick = False, json: JsonFlag = False, **reads: Any) -> None:
    """Look at all rows of a file or a run: counts, lengths, images, rows that are no good.

    Exit code 2 where a row is bad. A run's rows are read as its stages read them; a file's are
    tokenised with --run, or with --base and --vision.
    """
    from mmgraft.data.checking import Checker
    from mmgraft.data.formats.indexed import Joined
    from mmgraft.data.formats.sources import Checks, index_rows
    from mmgraft.data.rows import BadRow
    from mmgraft.training.stage_data import source_of
    from mmgraft.training.views import Selection, views

    chosen = Selection(target, **reads)
    found: list[tuple[View, Report]] = []
    for view in views(chosen):
        bad: list[BadRow] = []
        checks = Checks(images=False, on_bad=bad.append, one=False)
        rows = Joined([index_rows(source_of(entry), checks) for entry in view.entries])
        checker = Checker(view.processor, view.max_length, view.skip_text, quick, view.positions)
        found.append((view, checker.check(rows, bad)))
    count = len({row.key for _, report in found for row in report.bad})
    if json:
        checked = [
            {"files": [one.path for one in view.entries], "stages": list(view.stages)}
            | report.as_dict()
            for view, report in found
        ]
        print_json({"ok": not count, "checks": checked})
    else:
        for view, report in found:
            _show_report(view, report)
    if count:
        raise UsageError(
            f"{count} row{' is' if count == 1 else 's are'} bad; mend or remove them, or write "
            "on_bad_row: skip in the recipe to train without them"
        )


@app.command("preview", epilog="Example: mmgraft data preview rows.jsonl --run qwen2-7b-iaa")
@with_options("json", _READING)
def preview(
    target: _Target,
    row: Annotated[int, option("--row", "Number of the row, counted from 1.", min=1)] = 1,
    json: JsonFlag = False,
    **reads: Any,
) -> None:
    """Show one row as the model sees it: what is trained stands out, images are folded.

    Without colour, what is trained stands between ⟦ and ⟧.
    """
    from mmgraft.data.chat.preview import preview_row
    from mmgraft.data.formats.sources import is_there, row_at
    from mmgraft.training.stage_data import source_of
    from mmgraft.training.views import Selection, views

    settled = is_graft(target) or any(reads.get(name) for name in ("run", "base", "recipe"))
    if not settled and is_there(str(target)):
        reads["run"] = find_run()
    chosen = Selection(target, **reads)
    shown: list[tuple[View, Preview]] = []
    for view in views(chosen):
        if view.processor is None:
            raise UsageError("no base is known to read the row; give --run, or --base and --vision")
        one = row_at([source_of(entry) for entry in view.entries], row)
        shown.append((view, preview_row(view.processor, one, view.max_length, view.positions)))
    if json:
        print_json(
            {"previews": [{"stages": list(view.stages), **one.as_dict()} for view, one in shown]}
        )
        return
    for number, (view, one) in enumerate(shown):
        _show_preview(view, one, first=number == 0)


_ImageData = Annotated[
    Literal["paths", "embed", "beside"] | None,
    option("--image-data", "Write images as their paths, embed their bytes, or beside the file."),
]


@app.command("convert", epilog="Example: mmgraft data convert alpaca.json --to messages rows.jsonl")
def convert_rows(
    source: Annotated[str, argument("A file or shards of rows, or hub:OWNER/NAME.", metavar="IN")],
    out: Annotated[Path, argument("The .jsonl or .parquet file to write.")],
    to: Annotated[Literal["messages"], option("--to", "Layout to write.")] = "messages",
    images: ImagesOption = None,
    read: ReadOption = None,
    image_data: _ImageData = None,
    force: OverwriteFlag = False,
    json: JsonFlag = False,
) -> None:
    """Write rows of any layout as messages.

    The file appears when it is whole. An image is written as its path from the image folder, its
    bytes in the file (embed), or a file in a folder beside it.
    """
    from mmgraft.data.convert import Conversion
    from mmgraft.data.formats.sources import index_rows
    from mmgraft.recipes.source import entry_of
    from mmgraft.training.stage_data import source_of

    if out.suffix not in (".jsonl", ".parquet"):
        raise UsageError(f"{out}: name a .jsonl or a .parquet file to write")
    found = source_of(entry_of(source, images, read))
    folder = os.path.abspath(images or os.path.dirname(found.files()[0]))
    conversion = Conversion(out, image_data, folder)
    for path in [out, conversion.beside] if image_data == "beside" else [out]:
        refuse_to_overwrite(path, force)
    rows = index_rows(found)
    conversion.write(rows)
    layouts = Counter(row.layout for row in rows)
    if json:
        print_json({"rows": len(rows), "layouts": layouts, "to": to, "out": str(out)})
        return
    names = ", ".join(dict.fromkeys(layout.partition(":")[0] for layout in layouts))
    note(f"wrote {len(rows):,} rows of {names} to {out} as {to}")
    if image_data == "paths":
        note(f"image paths start from {folder}: --images {folder}")


def _show_report(view: "View", report: "Report") -> None:
    from rich.markup import escape

    out = stdout()
    left_out = " (left out, by text_rows: skip)" if view.skip_text and report.text_rows else ""
    lines = [
        ("rows", f"{report.rows:,}"),
        *(("layout", f"{layout} ({count:,} rows)") for layout, count in report.layouts.items()),
        ("bad", _faults(report)),
        ("no image", f"{report.text_rows:,}{left_out}"),
        ("twice", f"{len(report.twice):,} rows, {report.ids_twice:,} ids"),
        ("images", _images(report)),
        ("positions", _positions(report)),
    ]
    if report.max_length is not None:
        lines.append(("cut", f"{len(report.cut):,} rows, at {report.max_length:,} positions"))
    files = ", ".join(str(entry.path) for entry in view.entries)
    stages = f", as {', '.join(view.stages)} reads it" if view.stages else ""
    out.print(f"[bold]{escape(files + stages)}[/]")
    for name, text in lines:
        out.print(f"{name:<10} {escape(text)}")
    kept = f"(the first {_SHOWN}; --json has all)"
    for title, items in (
        ("longest", [f"{count:,}  {where}" for count, where in report.longest[:3]]),
        ("cut", report.cut),
        ("twice", [f"{where}, as {first}" for where, first in report.twice]),
        ("bad", [bad.reason for bad in report.bad]),
    ):
        if items:
            out.print(f"[bold]{title}[/]" + (f" {kept}" if len(items) > _SHOWN else ""))
            for item in items[:_SHOWN]:
                out.print(f"  {escape(item)}")


def _faults(report: "Report") -> str:
    parts = [f"{count:,} {fault}" for fault, count in report.faults().items() if count]
    return f"{len(report.bad):,}" + (f" ({', '.join(parts)})" if parts else "")


def _images(report: "Report") -> str:
    text = f"{report.images:,} in {report.files:,} files"
    if report.largest is not None:
        width, height, name = report.largest
        text += f", the largest {width:,} x {height:,} ({name})"
    return text


def _positions(report: "Report") -> str:
    numbers = report.positions()
    if numbers is None:
        return "not counted; give --run, or --base and --vision"
    return (
        f"{numbers['shortest']:,} to {numbers['longest']:,} a row, half of the rows up to "
        f"{numbers['median']:,g}, 95 % up to {numbers['p95']:,}; in all {numbers['all']:,}: "
        f"{numbers['of_images']:,} of images, {numbers['learned']:,} supervised"
    )


def _show_preview(view: "View", one: "Preview", first: bool) -> None:
    from rich.text import Text

    out = stdout()
    coloured = out.is_terminal and not out.no_color
    stages = f", as {', '.join(view.stages)} reads it" if view.stages else ""
    cut = f" of {one.whole:,}, where it is cut" if one.whole > one.count() else ""
    left_out = view.skip_text and not one.count("image")
    out.print(Text(("" if first else "\n") + one.row + stages, style="bold"))
    out.print(
        f"{one.count():,} positions{cut}: {one.count('image'):,} of images, "
        f"{one.count('learned'):,} supervised"
        + ("; left out, because it has no image (text_rows: skip)" if left_out else "")
    )
    text = Text()
    for piece in one.pieces:
        if piece.kind == "image":
            text.append(f"‹{piece.positions} image positions›", style="cyan")
        elif piece.kind == "learned":
            text.append(piece.text if coloured else f"⟦{piece.text}⟧", style="bold green")
        else:
            text.append(piece.text)
    out.print(text)
