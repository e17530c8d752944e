"""`mmgraft train`."""

from __future__ import annotations

from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmgraft.cli.options import DryRunFlag, JsonFlag

if TYPE_CHECKING:
    from mmgraft.recipes.recipe import Stage
    from mmgraft.training.run import Plan

_PLAN, _GO_ON = "What to train", "Go on or begin anew"


def train(
    context: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a graft; the only one here when not given."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="YAML file or shipped name.", rich_help_panel=_PLAN),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="LLaVA json or messages jsonl, for all stages or as STAGE=FILE; may be repeated.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option("--images", help="Folder that image paths start from.", rich_help_panel=_PLAN),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a value: stages.align.lr=1e-4, stages.*.batch_size=2, seed=3.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option("--max-steps", min=1, help="End every stage there.", rich_help_panel=_PLAN),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="cuda, mps or cpu; else the first there is."),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            "--processes",
            min=1,
            help="Train in so many at once, on CUDA one a card; the recipe says how: parallel.",
        ),
    ] = 1,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where a run stopped.", rich_help_panel=_GO_ON),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Train a trained or stopped run from its graft as it is.",
            rich_help_panel=_GO_ON,
        ),
    ] = False,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train a graft by its recipe, stage by stage, or go on with a run.

    Ctrl-C finishes the step, saves, and says how to go on.
    """
    from mmgraft.cli.console import note, print_json, stderr
    from mmgraft.cli.processes import (
        check_not_launched,
        command_line,
        end_with_launcher,
        launch,
    )
    from mmgraft.runs.find import find_run

    end_with_launcher()
    folder = find_run(run, announce=note)
    if processes > 1:
        check_not_launched()
        if not dry_run:
            context.params["run"] = folder
            again = ["train", *command_line(context, without="processes")]
            raise typer.Exit(launch(processes, again))
    # Everything below loads torch.
    from transformers.utils import logging

    from mmgraft.training.callbacks.progress import ProgressDisplay
    from mmgraft.training.devices import is_main_rank
    from mmgraft.training.distributed.parallel import processes as started
    from mmgraft.training.memory.shortage import warning
    from mmgraft.training.run import plan_training
    from mmgraft.training.run import train as train_run

    if not stderr().is_terminal:
        logging.disable_progress_bar()
    count = max(processes, started())  # --processes is more than 1 here in a dry run alone
    plan = plan_training(
        folder,
        recipe=recipe,
        data=data or (),
        images=images,
        overrides=set_ or (),
        resume=resume,
        restart=restart,
        max_steps=max_steps,
        device=device,
        count=count,
    )
    summary = _summary(plan, count)
    if dry_run:
        if is_main_rank():
            _show(summary, json)
        return

    def display(stage: Stage, number: int, stages: int) -> list[ProgressDisplay]:
        return [ProgressDisplay(stage.name, number, stages, stderr())]

    if is_main_rank() and (too_much := warning(plan)) is not None:
        note(f"warning: {too_much}")
    results = train_run(plan, announce=note, display=display)
    if not is_main_rank():
        return
    if json:
        print_json(
            {"run": str(folder), "device": plan.device, "stages": list(map(asdict, results))}
        )
        return
    if results:
        note(f"trained; talk to it with: mmgraft chat {folder}")


def _summary(plan: Plan, processes: int) -> dict[str, Any]:
    stages: list[dict[str, Any]] = []
    for number, stage in enumerate(plan.stages):
        rows = len(plan.rows[number]) - plan.skipped[number]
        a_step = stage.batch_size * stage.accumulate * processes
        an_epoch = ceil(ceil(rows / (stage.batch_size * processes)) / stage.accumulate)
        stages.append(
            {
                "stage": stage.name,
                "done": number < plan.first,
                "trains": stage.train,
                "workflow": stage.workflow,
                "rows": rows,
                "text_rows_skipped": plan.skipped[number],
                # How many rows a sequence holds is known when all of them are tokenised.
                "rows_a_step": None if stage.packing else a_step,
                "sequences_a_step": a_step,
                "steps": stage.max_steps
                or (None if stage.packing else ceil(an_epoch * (stage.epochs or 1))),
            }
        )
    return {
        "run": str(plan.run),
        "recipe": plan.recipe.name,
        "method": plan.recipe.method,
        "device": plan.device,
        "precision": plan.recipe.precision,
        "quantization": plan.recipe.quantization,
        "processes": processes,
        "parallel": plan.recipe.parallel,
        "bad_rows": [row.as_dict() for row in plan.bad],
        "stages": stages,
    }


def _show(summary: dict[str, Any], json: bool) -> None:
    from mmgraft.cli.console import note, print_json, stdout, table

    if json:
        print_json(summary)
        return
    for row in summary["bad_rows"]:
        note(f"would leave out: {row['reason']}")
    out, several = stdout(), summary["processes"] > 1
    out.print(
        f"would train {summary['run']} by {summary['recipe']} on {summary['device']}, "
        f"base {summary['quantization'] or 'in ' + summary['precision']}"
        + (f", {summary['processes']} processes ({summary['parallel']})" * several)
    )
    out.print(
        table(
            ["stage", "trains", "rows", "left out", "rows a step", "steps"],
            [
                [
                    stage["stage"] + (" (done)" if stage["done"] else ""),
                    ", ".join(stage["trains"]),
                    stage["rows"],
                    stage["text_rows_skipped"],
                    stage["rows_a_step"] or f"{stage['sequences_a_step']} packed sequences",
                    stage["steps"] or "known when packed",
                ]
                for stage in summary["stages"]
            ],
        )
    )
