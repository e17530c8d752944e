"""`mmgraft export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from mmgraft.cli.options import DryRunFlag, JsonFlag

if TYPE_CHECKING:
    from mmgraft.export.folder import Exported, Kind

_KINDS = ("graft", "full", "llava")
_DTYPES = ("bfloat16", "float32", "float16")


def export(
    run: Annotated[
        str | None,
        typer.Argument(
            help="Folder or Hub id of the graft. Default: the one here, or the only one below."
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to", help="graft: the adapter alone; full: with base and tower; llava: stock LLaVA."
        ),
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder. Default: ./<graft>-<to>.")
    ] = None,
    workflow: Annotated[
        str | None,
        typer.Option("--workflow", help="Which one, where an import wrote several."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="llava: bfloat16, float32 or float16. Default: the base's."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Where the base lies, if it was moved.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier export in the folder.")
    ] = False,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Write a graft for use elsewhere.

    To graft: the small adapter. To full: base, tower and graft in one folder that loads offline.
    To llava: an IAA graft of structure c, or a LLaVA one, as an ordinary model of transformers; it
    is compared with the graft before it is kept.
    """
    from mmgraft.cli.console import note, print_json

    _check(to, dtype)
    kind = cast("Kind", to)
    _quiet_unless_terminal(json)
    from mmgraft.export.folder import check_folder, default_folder, find_workflow

    folder = _find(run)
    target = check_folder(out or default_folder(folder, kind), folder, force)
    chosen = find_workflow(folder, workflow)
    options: dict[str, Any] = {"dry_run": dry_run, "say": note}
    if kind == "graft":
        from mmgraft.export.graft import export_graft

        result = export_graft(chosen, target, **options)
    elif kind == "full":
        from mmgraft.export.full import export_full

        result = export_full(chosen, target, base, **options)
    else:
        from mmgraft.export.llava.export import export_llava

        result = export_llava(chosen, target, base, dtype, **options)
    for text in result.notes:
        note(f"note: {text}")
    if json:
        print_json(_summary(result))
    else:
        _show(result)


def _check(to: str, dtype: str | None) -> None:
    """Refuse what needs no model to be refused."""
    from mmgraft.errors import UsageError, did_you_mean

    if not to:
        raise UsageError(f"say what to write with --to: {', '.join(_KINDS)}")
    if to not in _KINDS:
        raise UsageError(f"--to {to}: {did_you_mean(to, _KINDS)}")
    if dtype is not None and to != "llava":
        raise UsageError(
            f"--dtype goes with --to llava: {to} keeps its files as they are, and takes a dtype "
            "when it is loaded"
        )
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype}: choose {', '.join(_DTYPES)}")


def _find(run: str | None) -> Path:
    from mmgraft.cli.console import note
    from mmgraft.runs.find import find_run

    if run is None or Path(run).expanduser().exists() or run.count("/") != 1:
        return find_run(run, announce=note)
    from mmgraft.model.files.load import graft_folder

    return graft_folder(run)


def _summary(result: Exported) -> dict[str, Any]:
    return {
        "to": result.kind,
        "folder": str(result.folder),
        "written": result.written,
        "workflow": result.workflow,
        "files": [{"name": name, "bytes": size} for name, size in result.files.items()],
        "bytes": sum(result.files.values()),
        "largest_logit_difference": result.difference,
        "notes": result.notes,
    }


def _show(result: Exported) -> None:
    from mmgraft.cli.console import human_bytes, stdout, table

    rows = [[name, human_bytes(size)] for name, size in result.files.items()]
    rows.append([f"{len(result.files)} files", human_bytes(sum(result.files.values()))])
    verb: Literal["written to", "would be written to"]
    verb = "written to" if result.written else "would be written to"
    out = stdout()
    out.print(table(["file", "size"], rows, title=f"{verb} {result.folder}"))
    if result.difference is not None:
        out.print(
            f"stock transformers gives the graft's logits: largest difference "
            f"{result.difference:.1e}",
            markup=False,
        )


def _quiet_unless_terminal(json: bool) -> None:
    """Keep transformers' and the Hub client's bars out of logs and out of JSON."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    from mmgraft.cli.console import stderr

    if json or not stderr().is_terminal:
        disable_progress_bars()
        logging.disable_progress_bar()
