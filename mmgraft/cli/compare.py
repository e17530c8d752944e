"""`mmgraft compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmgraft.cli.options import DryRunFlag, JsonFlag

if TYPE_CHECKING:
    from mmgraft.comparison.plan import ComparisonPlan, StagePlan

_SHARED, _TRIAL = "What all arms share", "Less than all"


def compare(
    recipe: Annotated[
        str, typer.Argument(help="A shipped comparison (`mmgraft recipes ls`), or a YAML file.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; ./compare-NAME when not given.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Alias, Hub id or folder.", rich_help_panel=_SHARED),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option(
            "--vision", help="Hub id, folder or registered tower.", rich_help_panel=_SHARED
        ),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(
            "--root", help="Folder that paths of the file start from.", rich_help_panel=_SHARED
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Rows to train on, for all stages or as STAGE=FILE; may be repeated.",
            rich_help_panel=_SHARED,
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            "--images", help="Folder that image paths start from.", rich_help_panel=_SHARED
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of the order of rows.", rich_help_panel=_SHARED),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE in every arm's recipe, or ARM:KEY=VALUE in one; may be repeated.",
            rich_help_panel=_SHARED,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Run this arm; may be repeated.", rich_help_panel=_TRIAL),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option("--max-steps", min=1, help="End every stage there.", rich_help_panel=_TRIAL),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, help="Ask at most so many items a set.", rich_help_panel=_TRIAL
        ),
    ] = None,
    train_only: Annotated[
        bool,
        typer.Option("--train-only", help="Evaluate in a later call.", rich_help_panel=_TRIAL),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Questions at a time.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="cuda, mps or cpu; else the first there is."),
    ] = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train several grafts alike, one after another, measure them alike, and write one report.

    What is done is never done again: after a kill or Ctrl-C the same command goes on.
    """
    from mmgraft.cli.console import note, print_json, stderr, stdout
    from mmgraft.comparison.spec import load_comparison, with_files, with_settings

    comparison = load_comparison(recipe)
    shared: dict[str, Any] = {"base": base, "vision": vision, "root": root, "seed": seed}
    given = {key: value for key, value in shared.items() if value is not None}
    comparison = with_files(comparison.model_copy(update=given), data or [], images)
    comparison = with_settings(comparison, set_ or [])
    folder = out or Path(f"compare-{comparison.name}")
    # Everything below loads torch.
    from transformers.utils import logging

    from mmgraft.comparison.plan import make_plan

    if not stderr().is_terminal:
        logging.disable_progress_bar()
    plan = make_plan(
        comparison, folder, only=only or (), max_steps=max_steps, limit=limit, device=device
    )
    if dry_run:
        if json:
            print_json(summary(plan))
        else:
            stdout().print(f"would compare {len(plan.chosen)} arms in {folder}, on {plan.device}")
            show(plan)
        return
    if not json:
        show(plan)
    from mmgraft.comparison.runner import compare as run_comparison

    done = run_comparison(plan, train_only=train_only, batch_size=batch_size, announce=note)
    if json:
        print_json(
            {
                "out": str(folder),
                "arms": [{"name": name, "done": phases} for name, phases in done.arms.items()],
                "report": [str(path) for path in done.reports],
            }
        )
        return
    for path in done.reports:
        note(f"wrote {path}")


def summary(plan: ComparisonPlan) -> dict[str, Any]:
    """The plan as plain data."""
    return {
        "out": str(plan.out),
        "comparison": plan.comparison.name,
        "base": plan.base,
        "vision": plan.vision.name,
        "device": plan.device,
        "seed": plan.comparison.seed,
        "arms": [
            {
                "name": arm.name,
                "run": str(arm.run),
                "chosen": arm.name in plan.chosen,
                "recipe": arm.recipe.name,
                "method": arm.recipe.method,
                "base": arm.recipe.base,
                "own_budget": arm.own_budget,
                "done": list(arm.done),
                "stages": [
                    {
                        "stage": stage.name,
                        "trains": list(stage.trains),
                        "rows": stage.rows,
                        "rows_a_step": stage.rows_a_step,
                        "sequences_a_step": stage.sequences_a_step,
                        "steps": stage.steps,
                    }
                    for stage in arm.stages
                ],
            }
            for arm in plan.arms
        ],
        "evaluation": [one.name for one in plan.comparison.evaluation],
    }


def show(plan: ComparisonPlan) -> None:
    """Print the arms, with what of them is done."""
    from mmgraft.cli.console import stdout, table

    rows = []
    for arm in plan.arms:
        budget = "; ".join(_budget(stage) for stage in arm.stages)
        rows.append(
            [
                arm.name,
                arm.recipe.method,
                arm.recipe.base,
                "; ".join(", ".join(stage.trains) for stage in arm.stages),
                budget + (" (its own)" if arm.own_budget else ""),
                ", ".join(arm.done) or ("" if arm.name in plan.chosen else "left out"),
            ]
        )
    out = stdout()
    out.print(f"{plan.comparison.name}: base {plan.base}, tower {plan.vision.name}", markup=False)
    out.print(table(["arm", "method", "base", "trains", "steps x rows", "done"], rows))
    if any(arm.own_budget for arm in plan.arms):
        out.print("arms with a budget of their own are not trained alike: read them as such")


def _budget(stage: StagePlan) -> str:
    """Steps and what each holds; of packed rows, how many steps these make is not known yet."""
    if stage.packed is None:
        return f"{stage.name} {stage.steps} x {stage.rows_a_step}"
    steps = stage.steps or f"{stage.shown:g} epoch{'s' * (stage.shown != 1)} of {stage.rows} rows,"
    return f"{stage.name} {steps} x {stage.sequences_a_step} packed sequences"
