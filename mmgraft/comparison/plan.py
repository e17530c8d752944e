"""The arms of a comparison, resolved and checked before anything is trained."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from math import ceil
from pathlib import Path
from typing import Any, Literal

from mmgraft.aliases import resolve_alias
from mmgraft.comparison.files import FEATURES, Phase, arm_folder, phases_done, read_phase
from mmgraft.comparison.spec import ALL_STAGES, Comparison, arm_recipe, named_arms
from mmgraft.data.rows import OnBadRow
from mmgraft.errors import UsageError, did_you_mean
from mmgraft.evaluation.dialogues.dialogues import read_dialogues
from mmgraft.evaluation.items.files import read_items
from mmgraft.evaluation.sets import read_sets
from mmgraft.frozen import Frozen
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.create import create_graft
from mmgraft.model.files.graft_file import TemplateChoice
from mmgraft.recipes.recipe import DataEntry, Recipe, Stage
from mmgraft.recipes.source import with_max_steps
from mmgraft.training.devices import check_packages, pick_device
from mmgraft.training.stage_data import StageData, absolute, check_rows
from mmgraft.vision.spec import VisionSpec

WORKFLOW = "mm"


class StagePlan(Frozen):
    """One stage of an arm.

    Attributes:
        name: Name of the stage.
        trains: Groups of parameters.
        rows: Rows of its data, without those that are left out.
        rows_a_step: Rows an optimizer step on one device; None where rows are packed, because how
            many a sequence holds is known only when all are tokenised.
        steps: Optimizer steps; None where they depend on that.
        sequences_a_step: Sequences an optimizer step on one device; each is a row, or a pack of
            rows.
        epochs: How often the rows are seen; None where the recipe gives steps.
        packed: Tokens of a sequence of packed rows; None where rows are not packed.
    """

    name: str
    trains: tuple[str, ...]
    rows: int
    rows_a_step: int | None
    steps: int | None
    sequences_a_step: int
    epochs: float | None
    packed: int | None

    @property
    def budget(self) -> tuple[object, ...]:
        """Return what has to be the same for arms to be comparable: name, steps, rows a step.

        Where steps are not known yet: the rows, how often they are seen, and what a step holds.
        """
        steps = self.steps or (self.rows, self.epochs)
        return self.name, steps, self.sequences_a_step, self.packed


class ArmPlan(Frozen):
    """One arm, ready to be run.

    Attributes:
        name: Name of the arm.
        run: Its folder.
        recipe: Its recipe with absolute paths, as it is written into the run.
        stages: What each stage does.
        own_budget: Whether its steps or rows a step are not those of most arms.
        done: Phases that are done, with whatever settings.
    """

    name: str
    run: Path
    recipe: Recipe
    stages: tuple[StagePlan, ...]
    own_budget: bool
    done: tuple[Phase, ...]


class ComparisonPlan(Frozen):
    """A comparison that was checked and can start.

    Attributes:
        out: Its folder.
        comparison: The comparison with absolute paths and all arms named, as it is written down.
        base: Folder or Hub id.
        vision: The tower.
        device: Where it is trained and evaluated.
        chosen: Names of the arms that are run now.
        arms: All arms, in order.
    """

    out: Path
    comparison: Comparison
    base: str
    vision: VisionSpec
    device: str
    chosen: tuple[str, ...]
    arms: tuple[ArmPlan, ...] = ()


def make_plan(
    comparison: Comparison,
    out: Path,
    *,
    only: Sequence[str] = (),
    max_steps: int | None = None,
    limit: int | None = None,
    device: str | None = None,
) -> ComparisonPlan:
    """Check everything that can be checked before a model is loaded; nothing is written.

    Args:
        comparison: From ``load_comparison``.
        out: The comparison's folder.
        only: Names of the arms to run; default: all.
        max_steps: End every stage after so many steps.
        limit: Sample at most so many items of each evaluation set, and for attention by layer, and
            build at most so many dialogues of each shape.
        device: ``cuda``, ``mps`` or ``cpu``; default: the first available.

    Raises:
        UsageError: Something cannot work in an arm; names the arm.
    """
    arms = comparison.all_arms()
    for name in only:
        if not named_arms(arms, name):
            raise UsageError(f"no arm {name!r} in {comparison.name}; {did_you_mean(name, arms)}")
    chosen_device = pick_device(device)
    base, vision = resolve_alias(comparison.base), comparison.vision
    if Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().resolve())
    if isinstance(vision, str):
        vision = VisionSpec.from_name(vision)
    settled = comparison.placed().limited(limit)
    given = {name: arm_recipe(name, arm) for name, arm in arms.items()}
    recipes = {}
    for name, recipe in given.items():
        with _naming(name):
            recipes[name] = _recipe(recipe, settled, out, max_steps)
    _check_stages(settled, recipes)
    _check_alike(recipes)
    _check_sets(settled, recipes)
    settled = settled.model_copy(
        update={"arms": arms, "grid": {}, "base": base, "vision": vision, "recipe": None, "set": {}}
    )
    chosen = tuple(one for name in only for one in named_arms(arms, name)) or tuple(arms)
    plan = ComparisonPlan(out, settled, base, vision, chosen_device, chosen)
    return replace(plan, arms=_plan_arms(plan, recipes))


def _plan_arms(plan: ComparisonPlan, recipes: Mapping[str, Recipe]) -> tuple[ArmPlan, ...]:
    """Plan every arm; read its rows, and check that its graft can be made."""
    readers: dict[OnBadRow, StageData] = {"error": StageData(), "skip": StageData("skip")}
    stages: dict[str, tuple[StagePlan, ...]] = {}
    for name, recipe in recipes.items():
        run = arm_folder(plan.out, name)
        with _naming(name):
            reader = readers[recipe.on_bad_row]
            stages[name] = tuple(_stage(stage, recipe, reader) for stage in recipe.stages)
            check_packages(recipe, plan.device)
            if name in plan.chosen and read_phase(run, "graft") is None:
                make_graft(plan, recipe, run, dry_run=True)
    budgets = {name: tuple(stage.budget for stage in found) for name, found in stages.items()}
    usual = Counter(budgets.values()).most_common(1)[0][0]
    arms = []
    for name, recipe in recipes.items():
        run, own_budget = arm_folder(plan.out, name), budgets[name] != usual
        done = tuple(phases_done(run))
        arms.append(ArmPlan(name, run, recipe, stages[name], own_budget, done))
    return tuple(arms)


def make_graft(plan: ComparisonPlan, recipe: Recipe, run: Path, *, dry_run: bool = False) -> None:
    """Write the fresh graft of an arm, or only check that it can be made."""
    method = get_method(recipe.method)
    config = method.config_class.parse(recipe.graft.config, f"settings of method {method.name}")
    vision = plan.vision
    if vision.feature_layer is None and recipe.graft.feature_layer is not None:
        vision = vision.model_copy(update={"feature_layer": recipe.graft.feature_layer})
    plain = plan.comparison.template == "plain"
    create_graft(
        plan.base,
        vision,
        config,
        run,
        workflow=recipe.workflow or WORKFLOW,
        projector=recipe.graft.projector,
        template=TemplateChoice(kind="plain") if plain else None,
        seed=recipe.seed,
        dry_run=dry_run,
    )


def _recipe(recipe: Recipe, comparison: Comparison, out: Path, max_steps: int | None) -> Recipe:
    """Return an arm's recipe with the shared data, sets and tower features."""
    recipe = with_max_steps(recipe, max_steps)
    if comparison.data:
        stages = [_with_data(stage, comparison.data) for stage in recipe.stages]
        recipe = recipe.model_copy(update={"stages": stages, "data": []})
    missing = list(recipe.data_to_set())
    if missing:
        raise UsageError(
            f"no data for {', '.join(missing)}; write data: into the comparison, or give "
            "--data STAGE=FILE"
        )
    update: dict[str, Any] = {"evaluation": comparison.evaluation}
    if recipe.feature_cache is True:  # once for all arms
        update["feature_cache"] = str(out.resolve() / FEATURES)
    return absolute(recipe.model_copy(update=update).resolved(recipe.workflow or WORKFLOW))


def _with_data(stage: Stage, data: Mapping[str, Sequence[DataEntry]]) -> Stage:
    entries = data.get(stage.name, data.get(ALL_STAGES))
    if not entries or any(not entry.path for entry in entries):
        raise UsageError(
            f"no data for stage {stage.name!r} (there is some for {', '.join(data)}); write it "
            f"into data: of the comparison, or give --data {stage.name}=FILE"
        )
    return stage.model_copy(update={"data": entries})


def _check_stages(comparison: Comparison, recipes: Mapping[str, Recipe]) -> None:
    known = list(dict.fromkeys(s.name for recipe in recipes.values() for s in recipe.stages))
    for stage in comparison.data:
        if stage not in (ALL_STAGES, *known):
            raise UsageError(
                f"data is given for stage {stage!r}, which no arm has; {did_you_mean(stage, known)}"
            )


def _check_alike(recipes: Mapping[str, Recipe]) -> None:
    """Refuse arms that do not differ, such as those of a grid whose key is overridden."""
    own = {"name", "description"}
    trained = {name: recipe.model_dump(exclude=own) for name, recipe in recipes.items()}
    for one, other in combinations(trained, 2):
        if trained[one] == trained[other]:
            raise UsageError(
                f"arms {one!r} and {other!r} would be trained exactly alike; change a setting in "
                "one of them (another key, or --set, may override it)"
            )


def _check_sets(comparison: Comparison, recipes: Mapping[str, Recipe]) -> None:
    """Read all sets, so that nothing is trained for a set that cannot be evaluated."""
    try:
        _read_sets(comparison)
    except UsageError as error:
        root = comparison.root
        if root is None or Path(root).is_dir():
            raise
        raise UsageError(
            f"{error} (paths of the comparison start from {root}, and there is no such folder: "
            "write it with `mmgraft data prepare`, or name another with --root)"
        ) from error
    for one in comparison.evaluation:
        for name, recipe in recipes.items():
            workflow = recipe.workflow or WORKFLOW
            if one.modality == "image" and one.workflow not in (None, workflow):
                raise UsageError(
                    f"set {one.name!r} needs workflow {one.workflow!r}, and arm {name!r} has "
                    f"{workflow!r}; leave workflow out of the set"
                )


def _read_sets(comparison: Comparison) -> None:
    modalities: tuple[Literal["text", "image"], ...] = ("text", "image")
    for modality in modalities:
        if specs := [one for one in comparison.evaluation if one.modality == modality]:
            read_sets(specs, modality)
    if comparison.iit is not None and comparison.iit.path is not None:
        read_dialogues(Path(comparison.iit.path))
    if comparison.laws is not None:
        read_items(comparison.laws.items())


def _stage(stage: Stage, recipe: Recipe, reader: StageData) -> StagePlan:
    found = reader.rows(stage.data or [], recipe.seed, stage.image_share)
    rows = len(found) - check_rows(found, stage.name, stage.text_rows)
    epochs, a_step = stage.epochs or 1, stage.batch_size * stage.accumulate
    steps = ceil(ceil(ceil(rows / stage.batch_size) / stage.accumulate) * epochs)
    return StagePlan(
        name=stage.name,
        trains=tuple(stage.train),
        rows=rows,
        rows_a_step=None if stage.packing else a_step,
        steps=stage.max_steps or (None if stage.packing else steps),
        sequences_a_step=a_step,
        epochs=None if stage.max_steps else epochs,
        packed=stage.max_length if stage.packing else None,
    )


@contextmanager
def _naming(arm: str) -> Iterator[None]:
    """Put an arm's name before the message of an error."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"arm {arm!r}: {error}") from error
