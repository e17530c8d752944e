"""``mmgraft train``."""

from __future__ import annotations

from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmgraft.cli.console import note, print_json, stderr, stdout, table
from mmgraft.cli.options import DryRunFlag, JsonFlag, argument, option
from mmgraft.runs.find import find_run

if TYPE_CHECKING:
    from mmgraft.recipes.recipe import Stage
    from mmgraft.training.plan import Plan

_PLAN, _GO_ON = "What to train", "Go on or begin anew"


_RUN = "Folder of a graft; the only one here when not given."
_Run = Annotated[Path | None, argument(_RUN)]
_Recipe = Annotated[
    str | None, option("--recipe", "Recipe: YAML file or shipped name.", panel=_PLAN)
]
_DATA = "LLaVA json or messages jsonl, for all stages or as STAGE=FILE; may be repeated."
_Data = Annotated[list[str] | None, option("--data", _DATA, panel=_PLAN)]
_Images = Annotated[
    str | None, option("--images", "Folder that image paths start from.", panel=_PLAN)
]
_SET = "Change a value: stages.align.lr=1e-4, stages.*.batch_size=2, seed=3."
_Set = Annotated[list[str] | None, option("--set", _SET, panel=_PLAN)]
_MOST = "Number of steps after which every stage ends."
_MaxSteps = Annotated[int | None, option("--max-steps", _MOST, panel=_PLAN, min=1)]
_Device = Annotated[str | None, option("--device", "Device: cuda, mps, cpu; else the first found.")]
_PROCESSES = "Number of processes, on CUDA one a card; the recipe says how they share: parallel."
_Processes = Annotated[int, option("--processes", _PROCESSES, min=1)]
_Resume = Annotated[bool, option("--resume", "Go on where a run stopped.", panel=_GO_ON)]
_RESTART = "Train a trained or stopped run from its graft as it is."
_Restart = Annotated[bool, option("--restart", _RESTART, panel=_GO_ON)]


def train(
    context: typer.Context,
    run: _Run = None,
    recipe: _Recipe = None,
    data: _Data = None,
    images: _Images = None,
    set_: _Set = None,
    max_steps: _MaxSteps = None,
    device: _Device = None,
    processes: _Processes = 1,
    resume: _Resume = False,
    restart: _Restart = False,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train a graft by its recipe, stage by stage, or go on with a run.

    Ctrl-C finishes the step, saves, and says how to go on.
    """
    from mmgraft.cli import processes as launcher

    launcher.end_with_launcher()
    folder = find_run(run, announce=note)
    if processes > 1:
        launcher.check_not_launched()
        if not dry_run:
            context.params["run"] = folder
            again = ["train", *launcher.command_line(context, without="processes")]
            raise typer.Exit(launcher.launch(processes, again))
    from mmgraft.training.distributed.parallel import processes as started  # loads torch
    from mmgraft.training.run import plan_training

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
        count=max(processes, started()),  # --processes is more than 1 here in a dry run alone
    )
    if dry_run:
        _show(_summary(plan, max(processes, started())), json)
    else:
        _train(plan, json)


def _train(plan: Plan, json: bool) -> None:
    from mmgraft.training.callbacks.progress import ProgressDisplay
    from mmgraft.training.devices import is_main_rank, slow_precision
    from mmgraft.training.memory.shortage import warning
    from mmgraft.training.run import train as train_run

    def display(stage: Stage, number: int, stages: int) -> list[ProgressDisplay]:
        return [ProgressDisplay(stage.name, number, stages, stderr())]

    if is_main_rank():
        for warned in filter(None, (warning(plan), slow_precision(plan.recipe, plan.device))):
            note(f"warning: {warned}")
    results = train_run(plan, announce=note, display=display)
    if json and is_main_rank():
        stages = list(map(asdict, results))
        print_json({"run": str(plan.run), "device": plan.device, "stages": stages})
    elif results and is_main_rank():
        note(f"trained; talk to it with: mmgraft chat {plan.run}")


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
