"""``mmgraft train``."""

from dataclasses import asdict
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmgraft.cli import options
from mmgraft.cli.console import note, print_json, stderr, stdout, table
from mmgraft.runs.find import find_run

if TYPE_CHECKING:
    from mmgraft.training.plan import Plan

_plan = partial(options.given, panel="What to train")
_go_on = partial(options.option, panel="Go on or begin anew")
_DATA = "LLaVA json or messages jsonl, for all stages or as STAGE=FILE; may be repeated."
_SET = "Change a value: stages.align.lr=1e-4, stages.*.batch_size=2, seed=3."
_RESTART = "Train a trained or stopped run from its graft as it is."
_PROCESSES = "Number of processes, on CUDA one a card; the recipe says how they share: parallel."

#: Options that ``plan_training`` takes by these names.
_TRAINING = {
    "recipe": _plan(str, "Recipe: YAML file or shipped name."),
    "data": _plan(list[str], _DATA),
    "images": _plan(str, "Folder that image paths start from."),
    "read": (options.ReadOption, None),
    "overrides": _plan(list[str], "--set", _SET),
    "max_steps": _plan(int, "Number of steps after which every stage ends.", min=1),
    "device": options.given(str, "Device: cuda, mps, cpu; else the first found."),
}


@options.with_options("processes", _TRAINING)
def train(
    context: typer.Context,
    run: Annotated[
        Path | None, options.argument("Folder of a graft; the only one here when not given.")
    ] = None,
    processes: Annotated[int, options.option(_PROCESSES, min=1)] = 1,
    resume: Annotated[bool, _go_on("--resume", "Go on where a run stopped.")] = False,
    restart: Annotated[bool, _go_on("--restart", _RESTART)] = False,
    dry_run: options.DryRunFlag = False,
    json: options.JsonFlag = False,
    **training: Any,
) -> None:
    """Train a graft by its recipe, stage by stage, or go on with a run.

    Ctrl-C finishes the step, saves, and says how to go on.
    """
    from mmgraft.cli import processes as launcher

    launcher.end_with_launcher()
    folder = find_run(run)
    if processes > 1:
        launcher.check_not_launched()
        if not dry_run:
            context.params["run"] = folder
            again = ["train", *launcher.command_line(context, without="processes")]
            raise typer.Exit(launcher.launch(processes, again))
    from mmgraft.training.distributed.parallel import processes as started  # loads torch
    from mmgraft.training.run import plan_training

    count = max(processes, started())  # --processes is more than 1 here in a dry run alone
    plan = plan_training(folder, resume=resume, restart=restart, count=count, **training)
    if dry_run:
        _show(_summary(plan, count), json)
    else:
        _train(plan, json)


def _train(plan: "Plan", json: bool) -> None:
    from mmgraft.training.callbacks.progress import ProgressDisplay
    from mmgraft.training.devices import is_main_rank, slow_precision
    from mmgraft.training.memory.shortage import warning
    from mmgraft.training.run import train as train_run

    if is_main_rank():
        for warned in filter(None, (warning(plan), slow_precision(plan.recipe, plan.device))):
            note(f"warning: {warned}")
    results = train_run(plan, display=ProgressDisplay.on(stderr()))
    if json and is_main_rank():
        stages = list(map(asdict, results))
        print_json({"run": str(plan.run), "device": plan.device, "stages": stages})
    elif results and is_main_rank():
        note(f"trained; talk to it with: mmgraft chat {plan.run}")


def _summary(plan: "Plan", processes: int) -> dict[str, Any]:
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
    from mmgraft.training.devices import is_main_rank

    if not is_main_rank():
        return
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
