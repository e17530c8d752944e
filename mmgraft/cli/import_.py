"""``mmgraft import``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mmgraft.aliases import resolve_alias
from mmgraft.cli.console import human_bytes, human_count, note, print_json, stdout, table
from mmgraft.cli.options import DryRunFlag, ForceFlag, JsonFlag, RevisionOption, argument, option

if TYPE_CHECKING:
    from mmgraft.published.importer import ImportReport


_BASE = "The original LLM; if all tensors are equal, it is referred to."
_LAYERS = "Insertion points, where the checkpoint names none."
_TOWER = "Vision tower of its training, if it names another."


def import_checkpoint(
    checkpoint: Annotated[str, argument("Folder or Hub id of a checkpoint of the published code.")],
    out: Annotated[
        Path | None, option("--out", "-o", "Folder to write. Default: one of its name.")
    ] = None,
    base: Annotated[str | None, option(_BASE)] = None,
    layers: Annotated[str | None, option(_LAYERS)] = None,
    tower: Annotated[str | None, option(_TOWER)] = None,
    revision: RevisionOption = None,
    force: ForceFlag = False,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Turn a checkpoint of a method's published code into grafts.

    Its own base and vision tower are written beside the grafts. With --base they are compared,
    tensor by tensor, and an equal base is referred to instead. --dry-run on a Hub id fetches names
    and shapes only.
    """
    from dataclasses import asdict

    from mmgraft.published.importer import import_checkpoint as run

    report = run(
        checkpoint,
        out or _default_folder(checkpoint),
        base=None if base is None else resolve_alias(base),
        layers=layers,
        tower=tower,
        revision=revision,
        force=force,
        dry_run=dry_run,
    )
    if json:
        print_json({**asdict(report), "dry_run": dry_run})
        return
    _show(report, dry_run)


def _default_folder(checkpoint: str) -> Path:
    """Return its name in lower case for a Hub id; for a folder its name and ``-graft``."""
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return Path(f"{folder.resolve().name}-graft")
    return Path(checkpoint.rstrip("/").rpartition("/")[2].lower() or "imported")


def _show(report: "ImportReport", dry_run: bool) -> None:
    rows = [
        [
            graft.workflow,
            report.method,
            ",".join(map(str, graft.config["layers"])),
            human_count(graft.parameters),
            graft.folder,
        ]
        for graft in report.grafts
    ]
    out = stdout()
    out.print(table(["workflow", "method", "layers", "parameters", "folder"], rows))
    kind = "the checkpoint's own" if report.own_base else "equal, referred to"
    out.print(f"base: {report.base} ({kind})", markup=False)
    out.print(f"vision tower: {report.tower}", markup=False)
    verb = "would be written" if dry_run else "written"
    out.print(f"{human_bytes(report.bytes)} {verb}", markup=False)
    for text in report.notes:
        note(f"note: {text}")
    if not dry_run:
        note(f"try it: mmgraft chat {report.folder} --image FILE 'What is this?'")
