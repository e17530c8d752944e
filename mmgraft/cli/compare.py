"""``mmgraft compare``."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mmgraft.cli.console import note, print_json, stdout, table
from mmgraft.cli.options import DryRunFlag, JsonFlag, argument, option

if TYPE_CHECKING:
    from mmgraft.comparison.plan import ComparisonPlan, StagePlan

_shared = partial(option, panel="What all arms share")
_STAGE_KEYS = ("trains", "rows", "rows_a_step", "sequences_a_step", "steps")
_trial = partial(option, panel="Less than all")


def compare(
    recipe: Annotated[
        str, argument("A shipped comparison (`mmgraft recipes ls`), or a YAML file.")
    ],
    out: Annotated[Path | None, option("Folder; ./compare-NAME when not given.")] = None,
    base: Annotated[str | None, _shared("Base: alias, Hub id or folder.")] = None,
    vision: Annotated[str | None, _shared("Tower: Hub id, folder or registered name.")] = None,
    root: Annotated[str | None, _shared("Folder that the file's paths start from.")] = None,
    data: Annotated[
        list[str] | None,
        _shared("Rows to train on, for all stages or as STAGE=FILE; may be repeated."),
    ] = None,
    images: Annotated[str | None, _shared("Folder that image paths start from.")] = None,
    seed: Annotated[int | None, _shared("Seed of the order of rows.")] = None,
    set_: Annotated[
        list[str] | None,
        _shared(
            "--set", "KEY=VALUE in every arm's recipe, or ARM:KEY=VALUE in one; may be repeated."
        ),
    ] = None,
    only: Annotated[list[str] | None, _trial("Run this arm; may be repeated.")] = None,
    max_steps: Annotated[int | None, _trial("Largest number of steps a stage.", min=1)] = None,
    limit: Annotated[int | None, _trial("Largest number of items a set.", min=1)] = None,
    train_only: Annotated[bool, _trial("--train-only", "Evaluate in a later call.")] = False,
    batch_size: Annotated[int | None, option("Questions a batch in evaluation.", min=1)] = None,
    device: Annotated[str | None, option("Device: cuda, mps, cpu; else the first found.")] = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train several grafts alike, one after another, evaluate them alike, and write one report.

    What is done is never done again: after a kill or Ctrl-C the same command goes on.
    """
    from mmgraft.comparison.plan import make_plan
    from mmgraft.comparison.spec import load_comparison, with_files, with_settings

    trial: dict[str, Any] = {"only": only or (), "max_steps": max_steps, "limit": limit}
    given = {"base": base, "vision": vision, "root": root, "seed": seed}
    update = {key: value for key, value in given.items() if value is not None}
    comparison = load_comparison(recipe).model_copy(update=update)
    comparison = with_settings(with_files(comparison, data or [], images), set_ or [])
    plan = make_plan(comparison, out or Path(f"compare-{comparison.name}"), device=device, **trial)
    if not dry_run:
        _run(plan, train_only, batch_size, json)
    elif json:
        print_json(summary(plan))
    else:
        stdout().print(f"would compare {len(plan.chosen)} arms in {plan.out}, on {plan.device}")
        show(plan)


def _run(plan: "ComparisonPlan", train_only: bool, batch_size: int | None, json: bool) -> None:
    from mmgraft.comparison import runner

    if not json:
        show(plan)
    done = runner.compare(plan, train_only=train_only, batch_size=batch_size)
    if json:
        print_json(
            {
                "out": str(plan.out),
                "arms": [{"name": name, "done": phases} for name, phases in done.arms.items()],
                "report": [str(path) for path in done.reports],
            }
        )
    else:
        for path in done.reports:
            note(f"wrote {path}")


def summary(plan: "ComparisonPlan") -> dict[str, Any]:
    """Return the plan as plain data."""
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
                    {"stage": stage.name, **{key: getattr(stage, key) for key in _STAGE_KEYS}}
                    for stage in arm.stages
                ],
            }
            for arm in plan.arms
        ],
        "evaluation": [one.name for one in plan.comparison.evaluation],
    }


def show(plan: "ComparisonPlan") -> None:
    """Print the arms, and which of their phases are done."""
    rows = [
        [
            arm.name,
            arm.recipe.method,
            arm.recipe.base,
            "; ".join(", ".join(stage.trains) for stage in arm.stages),
            "; ".join(map(_budget, arm.stages)) + (" (its own)" if arm.own_budget else ""),
            ", ".join(arm.done) or ("" if arm.name in plan.chosen else "left out"),
        ]
        for arm in plan.arms
    ]
    out = stdout()
    out.print(f"{plan.comparison.name}: base {plan.base}, tower {plan.vision.name}", markup=False)
    out.print(table(["arm", "method", "base", "trains", "steps x rows", "done"], rows))
    if any(arm.own_budget for arm in plan.arms):
        out.print("arms with a budget of their own are not trained alike: read them as such")


def _budget(stage: "StagePlan") -> str:
    """Return steps and what each holds; how many steps packed rows make is not known yet."""
    if stage.packed is None:
        return f"{stage.name} {stage.steps} x {stage.rows_a_step}"
    epochs = f"{stage.epochs:g} epoch{'s' * (stage.epochs != 1)}" if stage.epochs else ""
    steps = stage.steps or f"{epochs} of {stage.rows} rows,"
    return f"{stage.name} {steps} x {stage.sequences_a_step} packed sequences"
