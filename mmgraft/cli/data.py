"""`mmgraft data`: list and write the sets and models that packages carry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmgraft.cli.options import DryRunFlag, JsonFlag

_STAMPS = "Pictures of stamps"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="List and write the data sets and models that packages carry.",
)


@app.command("ls", epilog="Example: mmgraft data ls")
def list_data(json: JsonFlag = False) -> None:
    """List what can be prepared, and which packages it is read from."""
    from mmgraft.cli.console import print_json, stdout, table
    from mmgraft.demo.packaged import offers

    found = offers()
    if json:
        rows = [
            {
                "name": offer.name,
                "kind": offer.kind,
                "content": offer.content,
                "licence": offer.licence,
                "packages": [package.name for package in offer.packages],
                "missing": list(offer.missing),
            }
            for offer in found
        ]
        print_json({"data": rows})
        return
    stdout().print(
        table(
            ["name", "kind", "licence", "installed", "what it is"],
            [
                [
                    offer.name,
                    offer.kind,
                    offer.licence,
                    "no" if offer.missing else "yes",
                    offer.content,
                ]
                for offer in found
            ],
        )
    )


@app.command("prepare", epilog="Example: mmgraft data prepare easy-vqa --out easy-vqa")
def prepare(
    name: Annotated[str, typer.Argument(help="A name of `mmgraft data ls`.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write into; ./NAME when not given.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.")] = 0,
    source: Annotated[
        Path | None,
        typer.Option("--source", help="Folder of Tux Paint's stamps.", rich_help_panel=_STAMPS),
    ] = None,
    photos: Annotated[
        Path | None,
        typer.Option(
            "--photos",
            help="Folder of photographs to paste on; those of packages when not given.",
            rich_help_panel=_STAMPS,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option("--size", help="Side of the pictures in pixels.", rich_help_panel=_STAMPS),
    ] = None,
    boxes: Annotated[
        str | None,
        typer.Option(
            "--boxes",
            help="How boxes are written: unit, thousand or pixel.",
            rich_help_panel=_STAMPS,
        ),
    ] = None,
    stamps: Annotated[
        str | None,
        typer.Option("--stamps", help="On a picture: 2, or 2-4.", rich_help_panel=_STAMPS),
    ] = None,
    pictures: Annotated[
        int | None,
        typer.Option("--pictures", help="To train on.", rich_help_panel=_STAMPS),
    ] = None,
    test_pictures: Annotated[
        int | None,
        typer.Option(
            "--test-pictures", help="In each of the two test files.", rich_help_panel=_STAMPS
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over files of the same names.")
    ] = False,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Write a packaged set or model to a folder.

    The same seed gives the same files. They stand there whole or not at all.
    """
    from mmgraft.cli.console import note, print_json
    from mmgraft.demo import packaged

    options: dict[str, Any] = {
        "source": source,
        "photos": photos,
        "size": size,
        "boxes": boxes,
        "stamps": stamps,
        "pictures": pictures,
        "test_pictures": test_pictures,
    }
    done = packaged.prepare(
        name,
        out.expanduser() if out is not None else Path(name),
        seed=seed,
        force=force,
        dry_run=dry_run,
        options=options,
        announce=note,
    )
    if json:
        print_json(done.as_dict())
        return
    for file in done.files:
        rows = f" ({done.rows[file]:,} rows)" if file in done.rows else ""
        note(f"{'wrote' if done.written else 'would write'} {done.out / file}{rows}")
    if not done.files:
        note(f"would write {done.name} to {done.out}")
    note(f"licence: {done.licence}")
