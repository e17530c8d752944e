"""``mmgraft push``."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmgraft.cli.console import confirm, human_bytes, note, print_json, stdout, table
from mmgraft.cli.options import DryRunFlag, JsonFlag, YesFlag, argument, option
from mmgraft.runs.find import find_run

if TYPE_CHECKING:
    from mmgraft.hub.push import PushPlan, Target


_RUN = "Folder of the graft. Default: the one here, or the only one below."
_REPO_ID = "OWNER/NAME. Default: your name and the folder's."
_BASE_ID = "Hub id of the base, where it is a local folder."
_VISION_ID = "Hub id of the tower, where it is a local folder."
_LICENSE = "Licence in the model card, such as apache-2.0."


def push(
    run: Annotated[Path | None, argument(_RUN)] = None,
    repo_id: Annotated[str | None, option(_REPO_ID)] = None,
    private: Annotated[bool, option("--private", "Make the new repository private.")] = False,
    base_id: Annotated[str | None, option(_BASE_ID)] = None,
    vision_id: Annotated[str | None, option(_VISION_ID)] = None,
    license: Annotated[str | None, option(_LICENSE)] = None,
    dry_run: DryRunFlag = False,
    yes: YesFlag = False,
    json: JsonFlag = False,
) -> None:
    """Put a graft on the Hub with its model card, in one commit.

    Checkpoints stay here. A base on the Hub is referred to; one inside the folder goes along.
    """
    from mmgraft.hub.push import default_name, find_target, plan_push, send

    folder = find_run(run)
    plan = plan_push(folder, base_id, vision_id, license)
    if dry_run:
        _list(plan, repo_id or default_name(folder), private, json)
        return
    target = find_target(plan, repo_id, private)
    for warning in (*plan.warnings, *target.warnings):
        note(f"note: {warning}")
    plan = replace(plan, record=target.record)
    if not confirm(_question(plan, target), yes):
        note("nothing was pushed")
        raise typer.Exit(1)
    url = send(plan, target, private)
    if json:
        print_json({"url": url, **_summary(plan, target.repo_id, target.private)})
        return
    typer.echo(url)


def _question(plan: "PushPlan", target: "Target") -> str:
    files = plan.all_files(target.repo_id)
    size = human_bytes(sum(file.size for file in files))
    new = "new " if target.revision is None else ""
    kind = "private" if target.private else "public"
    return f"Push {len(files)} files, {size}, to the {new}{kind} {target.repo_id}?"


def _list(plan: "PushPlan", repo_id: str, private: bool, json: bool) -> None:
    for warning in plan.warnings:
        note(f"note: {warning}")
    repo_id = repo_id if "/" in repo_id else f"<you>/{repo_id}"
    summary = _summary(plan, repo_id, private)
    if json:
        print_json({"url": None, **summary})
        return
    files = summary["files"]
    rows = [[file["name"], human_bytes(file["bytes"])] for file in files]
    rows.append([f"{len(files)} files", human_bytes(summary["bytes"])])
    kind = "private" if private else "public"
    stdout().print(table(["file", "size"], rows, title=f"would be pushed to {repo_id} ({kind})"))


def _summary(plan: "PushPlan", repo_id: str, private: bool) -> dict[str, Any]:
    files = [{"name": f.name, "bytes": f.size} for f in plan.all_files(repo_id)]
    return {
        "repo_id": repo_id,
        "private": private,
        "files": files,
        "bytes": sum(file["bytes"] for file in files),
        "warnings": plan.warnings,
    }
