"""``mmgraft recipes``: list, show, copy and check training recipes and comparisons."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mmgraft.cli.console import note, print_json, refuse_to_overwrite, stdout, table
from mmgraft.cli.options import DryRunFlag, JsonFlag, OverwriteFlag, argument, option
from mmgraft.comparison import spec
from mmgraft.errors import UsageError
from mmgraft.grafts.registry import get_method
from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.recipes.source import find_recipe, load_recipe, shipped_recipes
from mmgraft.textfiles import read_text

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="List, show, copy and check training recipes.",
)

Name = Annotated[str, argument("A shipped recipe or comparison, or the path of a YAML file.")]


@app.command("ls", epilog="Example: mmgraft recipes ls")
def list_recipes(
    method: Annotated[str | None, option("--method", "Only recipes for this method.")] = None,
    json: JsonFlag = False,
) -> None:
    """List the recipes that come with mmgraft, and the comparisons for `mmgraft compare`."""
    if method is not None:
        get_method(method)
    recipes = [load_recipe(name) for name in shipped_recipes()]
    recipes = [recipe for recipe in recipes if method in (None, recipe.method)]
    names = spec.shipped_comparisons() if method is None else []
    comparisons = {name: spec.load_comparison(name) for name in names}
    if json:
        print_json(
            {
                "recipes": [_recipe_data(recipe) for recipe in recipes],
                "comparisons": [
                    {"name": name, "arms": list(one.all_arms()), "description": one.description}
                    for name, one in comparisons.items()
                ],
            }
        )
        return
    rows = [
        [one.name, one.method, one.quantization or one.base, _stages(one), one.description]
        for one in recipes
    ]
    out = stdout()
    out.print(table(["recipe", "method", "base", "stages", "what it is"], rows))
    if comparisons:
        out.print()
        rows = [
            [name, ", ".join(one.arms or one.all_arms()), one.description]
            for name, one in comparisons.items()
        ]
        out.print(table(["comparison", "arms", "what it is"], rows))


def _recipe_data(recipe: Recipe) -> dict[str, Any]:
    kept = recipe.model_dump(include={"name", "method", "base", "quantization", "description"})
    return {**kept, "stages": [stage.name for stage in recipe.stages]}


def _stages(recipe: Recipe) -> str:
    return ", ".join(stage.name for stage in recipe.stages)


@app.command("show", epilog="Example: mmgraft recipes show iaa-24gb")
def show(name: Name, json: JsonFlag = False) -> None:
    """Print a recipe as it is written, comments and all."""
    path = _find(name)
    if json:
        found = spec.load_comparison(path) if spec.is_comparison(path) else load_recipe(path)
        print_json(found.model_dump(mode="json"))
        return
    typer.echo(read_text(path), nl=False)


def _find(name: str) -> Path:
    """Return the file of a recipe or a comparison; no two shipped ones have one name."""
    if name in spec.shipped_comparisons() and not Path(name).is_file():
        return spec.find_comparison(name)
    return find_recipe(name)


_To = Annotated[Path | None, argument("File or folder to write; ./NAME.yaml when not given.")]


@app.command("cp", epilog="Example: mmgraft recipes cp iaa-24gb my-recipe.yaml")
def copy(
    name: Name,
    to: _To = None,
    force: OverwriteFlag = False,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Copy a recipe, to change it."""
    source = _find(name)
    target = Path(source.name) if to is None else to.expanduser()
    if target.is_dir():
        target = target / source.name
    refuse_to_overwrite(target, force)
    if target.exists() and target.samefile(source):
        raise UsageError(f"{target} is the recipe itself; name another file")
    if not dry_run:
        target.write_text(read_text(source), encoding="utf-8")
    if json:
        print_json({"recipe": source.stem, "file": str(target), "written": not dry_run})
        return
    note(f"{'would write' if dry_run else 'wrote'} {target}")


@app.command("validate", epilog="Example: mmgraft recipes validate my-recipe.yaml")
def validate(
    name: Name,
    method: Annotated[str | None, option("--method", "Refuse a recipe for another method.")] = None,
    json: JsonFlag = False,
) -> None:
    """Check a recipe: every key, every value, and what a stage may train."""
    path = _find(name)
    if spec.is_comparison(path):
        _validate_comparison(path, method, json)
        return
    recipe = load_recipe(path, method=method)
    missing = list(recipe.data_to_set())
    recipe = recipe.resolved()
    if json:
        resolved = recipe.model_dump(mode="json")
        print_json({"valid": True, "data_to_set": missing, "recipe": resolved})
        return
    out = stdout()
    out.print(f"{path.name} is a right recipe for {recipe.method}")
    columns = ["stage", "trains", "learning rate", "rows a step", "length", "text rows"]
    out.print(table(columns, [_stage_row(stage) for stage in recipe.stages]))
    if missing:
        out.print(f"still to set: {', '.join(missing)} (or give --data to `mmgraft train`)")


def _stage_row(stage: Stage) -> list[Any]:
    length = f"{stage.max_steps} steps" if stage.max_steps else f"{stage.epochs:g} epochs"
    rate = stage.lr
    if isinstance(rate, dict):
        rate = ", ".join(f"{group} {value:g}" for group, value in rate.items())
    elif isinstance(rate, float):
        rate = f"{rate:g}"
    rows = stage.batch_size * stage.accumulate
    return [stage.name, ", ".join(stage.train), rate, rows, length, stage.text_rows]


def _validate_comparison(path: Path, method: str | None, json: bool) -> None:
    if method is not None:
        raise UsageError(f"{path} is a comparison, which has no one method; leave --method out")
    comparison = spec.load_comparison(path)
    arms = comparison.all_arms()
    recipes = {name: spec.arm_recipe(name, arm) for name, arm in arms.items()}
    if json:
        print_json({"valid": True, "comparison": comparison.model_dump(mode="json")})
        return
    out = stdout()
    out.print(f"{path.name} is a right comparison of {len(arms)} arms")
    rows = [
        [name, recipe.method, arms[name].recipe, _stages(recipe)]
        for name, recipe in recipes.items()
    ]
    out.print(table(["arm", "method", "recipe", "stages"], rows))
