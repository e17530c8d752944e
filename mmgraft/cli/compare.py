"""``mmgraft compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mmgraft.cli.options import DryRunFlag, JsonFlag, argument, option

if TYPE_CHECKING:
    from mmgraft.comparison.plan import ComparisonPlan, StagePlan
    from mmgraft.comparison.spec import Comparison

_SHARED, _TRIAL = "What all arms share", "Less than all"


RecipeArgument = Annotated[
    str, argument("A shipped comparison (`mmgraft recipes ls`), or a YAML file.")
]
OutOption = Annotated[Path | None, option("--out", "Folder; ./compare-NAME when not given.")]
BaseOption = Annotated[str | None, option("--base", "Alias, Hub id or folder.", panel=_SHARED)]
VisionOption = Annotated[
    str | None, option("--vision", "Hub id, folder or registered tower.", panel=_SHARED)
]
RootOption = Annotated[
    str | None, option("--root", "Folder that the file's paths start from.", panel=_SHARED)
]
DataOption = Annotated[
    list[str] | None,
    option(
        "--data",
        "Rows to train on, for all stages or as STAGE=FILE; may be repeated.",
        panel=_SHARED,
    ),
]
ImagesOption = Annotated[
    str | None, option("--images", "Folder that image paths start from.", panel=_SHARED)
]
SeedOption = Annotated[int | None, option("--seed", "Seed of the order of rows.", panel=_SHARED)]
_SET_HELP = "KEY=VALUE in every arm's recipe, or ARM:KEY=VALUE in one; may be repeated."
SetOption = Annotated[list[str] | None, option("--set", _SET_HELP, panel=_SHARED)]
OnlyOption = Annotated[
    list[str] | None, option("--only", "Run this arm; may be repeated.", panel=_TRIAL)
]
MaxStepsOption = Annotated[
    int | None, option("--max-steps", "Largest number of steps a stage.", panel=_TRIAL, min=1)
]
LimitOption = Annotated[
    int | None, option("--limit", "Largest number of items a set.", panel=_TRIAL, min=1)
]
TrainOnlyFlag = Annotated[bool, option("--train-only", "Evaluate in a later call.", panel=_TRIAL)]
BatchSizeOption = Annotated[
    int | None, option("--batch-size", "Questions a batch in evaluation.", min=1)
]
DeviceOption = Annotated[
    str | None, option("--device", "cuda, mps or cpu; default: the first available.")
]


def compare(
    recipe: RecipeArgument,
    out: OutOption = None,
    base: BaseOption = None,
    vision: VisionOption = None,
    root: RootOption = None,
    data: DataOption = None,
    images: ImagesOption = None,
    seed: SeedOption = None,
    set_: SetOption = None,
    only: OnlyOption = None,
    max_steps: MaxStepsOption = None,
    limit: LimitOption = None,
    train_only: TrainOnlyFlag = False,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train several grafts alike, one after another, evaluate them alike, and write one report.

    What is done is never done again: after a kill or Ctrl-C the same command goes on.
    """
    from mmgraft.comparison.spec import load_comparison, with_files, with_settings

    given = {"base": base, "vision": vision, "root": root, "seed": seed}
    update = {key: value for key, value in given.items() if value is not None}
    comparison = load_comparison(recipe).model_copy(update=update)
    comparison = with_settings(with_files(comparison, data or [], images), set_ or [])
    plan = _plan(comparison, out, only=only or (), max_steps=max_steps, limit=limit, device=device)
    if dry_run:
        _show_dry_run(plan, json)
    else:
        _run(plan, train_only, batch_size, json)


def _plan(comparison: Comparison, out: Path | None, **options: Any) -> ComparisonPlan:
    from mmgraft.cli.loading import quiet_bars
    from mmgraft.comparison.plan import make_plan

    quiet_bars()
    return make_plan(comparison, out or Path(f"compare-{comparison.name}"), **options)


def _show_dry_run(plan: ComparisonPlan, json: bool) -> None:
    from mmgraft.cli.console import print_json, stdout

    if json:
        print_json(summary(plan))
    else:
        stdout().print(f"would compare {len(plan.chosen)} arms in {plan.out}, on {plan.device}")
        show(plan)


def _run(plan: ComparisonPlan, train_only: bool, batch_size: int | None, json: bool) -> None:
    from mmgraft.cli.console import note, print_json
    from mmgraft.comparison import runner

    if not json:
        show(plan)
    done = runner.compare(plan, train_only=train_only, batch_size=batch_size, announce=note)
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


def summary(plan: ComparisonPlan) -> dict[str, Any]:
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
    """Print the arms, and which of their phases are done."""
    from mmgraft.cli.console import stdout, table

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


def _budget(stage: StagePlan) -> str:
    """Return steps and what each holds; how many steps packed rows make is not known yet."""
    if stage.packed is None:
        return f"{stage.name} {stage.steps} x {stage.rows_a_step}"
    epochs = f"{stage.epochs:g} epoch{'s' * (stage.epochs != 1)}" if stage.epochs else ""
    steps = stage.steps or f"{epochs} of {stage.rows} rows,"
    return f"{stage.name} {steps} x {stage.sequences_a_step} packed sequences"
