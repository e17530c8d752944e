"""The arms of a comparison, resolved and checked before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from mmgraft.aliases import resolve_alias
from mmgraft.comparison.files import FEATURES, PHASES, Phase, arm_folder, read_phase
from mmgraft.comparison.spec import ALL_STAGES, Comparison, arm_recipe
from mmgraft.data.bad_rows import OnBadRow
from mmgraft.errors import UsageError, did_you_mean
from mmgraft.evaluation.iit_files import read_dialogues
from mmgraft.evaluation.item_files import read_items
from mmgraft.evaluation.text import read_text_sets
from mmgraft.evaluation.vision import read_vision_sets
from mmgraft.grafts.registry import get_method
from mmgraft.model.graft_file import TemplateChoice
from mmgraft.model.grafting import create_graft
from mmgraft.model.vision.spec import VisionSpec
from mmgraft.training.devices import check_packages, pick_device
from mmgraft.training.recipe import Recipe, Stage
from mmgraft.training.recipe_source import with_max_steps
from mmgraft.training.stage_data import StageData, absolute, check_rows


@dataclass(frozen=True)
class StagePlan:
    """One stage of an arm.

    Attributes:
        name: Of the stage.
        trains: Groups of parameters.
        rows: In its data, without those that are left out.
        rows_a_step: On one device; None where rows are packed: how many a sequence holds is known
            when all of them are tokenised.
        steps: Of the optimizer; None where it depends on that.
        sequences_a_step: On one device; each is a row, or a pack of rows.
        shown: How often the rows are seen; None where the steps are given.
        packed: Positions of a sequence of packed rows; None where rows are not packed.
    """

    name: str
    trains: tuple[str, ...]
    rows: int
    rows_a_step: int | None
    steps: int | None
    sequences_a_step: int
    shown: float | None
    packed: int | None

    @property
    def budget(self) -> tuple[object, ...]:
        """What must be the same for arms to be comparable: name, steps, rows a step.

        Of packed rows, whose steps are not known yet: the rows, how often, and what a step holds.
        """
        steps = self.steps or (self.rows, self.shown)
        return self.name, steps, self.sequences_a_step, self.packed


@dataclass(frozen=True)
class ArmPlan:
    """One arm, ready to be run.

    Attributes:
        name: Of the arm.
        description: The arm's own.
        run: Its folder.
        recipe: Resolved, paths whole; written into the run.
        stages: What each stage does.
        own_budget: Whether its steps or rows a step are not those of most arms.
        done: Phases that are done, with whatever settings.
    """

    name: str
    description: str
    run: Path
    recipe: Recipe
    stages: tuple[StagePlan, ...]
    own_budget: bool
    done: tuple[Phase, ...]


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison that has been checked and can begin.

    Attributes:
        out: Its folder.
        comparison: With whole paths and all arms named, as it is written down.
        base: Folder or Hub id.
        vision: The tower.
        device: Where it is trained and asked.
        arms: In order.
        chosen: Names of the arms that are run now.
    """

    out: Path
    comparison: Comparison
    base: str
    vision: VisionSpec
    device: str
    arms: tuple[ArmPlan, ...]
    chosen: tuple[str, ...]

    @property
    def template(self) -> TemplateChoice | None:
        """What the grafts are made with."""
        return None if self.comparison.template == "chat" else TemplateChoice(kind="plain")


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
        comparison: From `load_comparison`.
        out: The comparison's folder.
        only: Names of the arms to run; default: all.
        max_steps: End every stage after so many steps.
        limit: Draw at most so many items of each evaluation set, and for the attention sums, and
            build at most so many dialogues of each shape.
        device: `cuda`, `mps` or `cpu`; default: the first that is there.

    Raises:
        UsageError: Anything that could not work in any arm, with the arm's name.
    """
    arms = comparison.all_arms()
    for name in only:
        if name not in arms:
            raise UsageError(f"no arm {name!r} in {comparison.name}; {did_you_mean(name, arms)}")
    chosen = pick_device(device)
    settled = _limited(comparison.placed(), limit)
    base = resolve_alias(comparison.base)
    if Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().resolve())
    vision = comparison.vision
    if isinstance(vision, str):
        vision = VisionSpec.from_name(vision)
    raw = {name: arm_recipe(name, arm) for name, arm in arms.items()}
    recipes = {
        name: _in_arm(name, lambda name=name: _recipe(raw[name], settled, out, max_steps))
        for name in arms
    }
    _check_stages(settled, recipes)
    _check_alike(recipes)
    try:
        _check_sets(settled, recipes)
    except UsageError as error:
        root = settled.root
        if root is None or Path(root).is_dir():
            raise
        raise UsageError(
            f"{error} (paths of the comparison start from {root}, and there is no such folder: "
            "write it with `mmgraft data prepare`, or name another with --root)"
        ) from error
    plan = ComparisonPlan(out, settled, base, vision, chosen, (), tuple(only) or tuple(arms))
    readers: dict[OnBadRow, StageData] = {"error": StageData(), "skip": StageData("skip")}
    stages: dict[str, tuple[StagePlan, ...]] = {}
    for name, recipe in recipes.items():
        reader = readers[recipe.on_bad_row]
        stages[name] = _in_arm(name, lambda recipe=recipe, reader=reader: _stages(recipe, reader))
        _in_arm(name, lambda recipe=recipe: check_packages(recipe, chosen))
        if name in plan.chosen and read_phase(arm_folder(out, name), "graft") is None:
            _in_arm(
                name,
                lambda recipe=recipe, name=name: make_graft(
                    plan, recipe, arm_folder(out, name), dry_run=True
                ),
            )
    budgets = {name: tuple(stage.budget for stage in found) for name, found in stages.items()}
    usual = Counter(budgets.values()).most_common(1)[0][0]
    planned = tuple(
        ArmPlan(
            name=name,
            description=arms[name].description or recipe.description,
            run=arm_folder(out, name),
            recipe=recipe,
            stages=stages[name],
            own_budget=budgets[name] != usual,
            done=_done(arm_folder(out, name)),
        )
        for name, recipe in recipes.items()
    )
    named = settled.model_copy(
        update={"arms": arms, "grid": {}, "base": base, "vision": vision, "recipe": None, "set": {}}
    )
    return ComparisonPlan(out, named, base, vision, chosen, planned, plan.chosen)


def make_graft(plan: ComparisonPlan, recipe: Recipe, run: Path, *, dry_run: bool = False) -> None:
    """Write the fresh graft of an arm, or check only that it can be made."""
    kind = get_method(recipe.method)
    config = kind.config_class.parse(recipe.graft.config, f"settings of method {kind.name}")
    vision = plan.vision
    if vision.feature_layer is None and recipe.graft.feature_layer is not None:
        vision = vision.model_copy(update={"feature_layer": recipe.graft.feature_layer})
    create_graft(
        plan.base,
        vision,
        config,
        run,
        workflow=recipe.workflow or "mm",
        projector=recipe.graft.projector,
        template=plan.template,
        dry_run=dry_run,
    )


def _recipe(recipe: Recipe, comparison: Comparison, out: Path, max_steps: int | None) -> Recipe:
    """An arm's recipe with the shared data, sets and tower features."""
    if max_steps is not None:
        recipe = with_max_steps(recipe, max_steps)
    if comparison.data:
        stages = [_with_data(stage, comparison) for stage in recipe.stages]
        recipe = recipe.model_copy(update={"stages": stages, "data": []})
    missing = list(recipe.data_to_set())
    if missing:
        raise UsageError(
            f"no data for {', '.join(missing)}; write data: into the comparison, or give "
            "--data STAGE=FILE"
        )
    if recipe.feature_cache is True:  # once for all arms
        recipe = recipe.model_copy(update={"feature_cache": str(out.resolve() / FEATURES)})
    recipe = recipe.model_copy(update={"evaluation": comparison.evaluation})
    return absolute(recipe.resolved(recipe.workflow or "mm"))


def _with_data(stage: Stage, comparison: Comparison) -> Stage:
    data = comparison.data
    entries = data.get(stage.name, data.get(ALL_STAGES))
    if not entries or any(not entry.path for entry in entries):
        known = ", ".join(data)
        raise UsageError(
            f"no data for stage {stage.name!r} (there is some for {known}); write it into data: of "
            f"the comparison, or give --data {stage.name}=FILE"
        )
    return stage.model_copy(update={"data": entries})


def _check_stages(comparison: Comparison, recipes: dict[str, Recipe]) -> None:
    known = list(dict.fromkeys(s.name for recipe in recipes.values() for s in recipe.stages))
    for stage in comparison.data:
        if stage != ALL_STAGES and stage not in known:
            raise UsageError(
                f"data is given for stage {stage!r}, which no arm has; {did_you_mean(stage, known)}"
            )


def _check_alike(recipes: dict[str, Recipe]) -> None:
    """Refuse arms that differ in nothing, as those of a grid whose key is set over do."""
    seen: list[tuple[str, dict[str, Any]]] = []
    for name, recipe in recipes.items():
        trained = recipe.model_dump(exclude={"name", "description"})
        for other, before in seen:
            if trained == before:
                raise UsageError(
                    f"arms {other!r} and {name!r} would be trained exactly alike; set something "
                    "otherwise in one of them (another key, or --set, may come after theirs)"
                )
        seen.append((name, trained))


def _check_sets(comparison: Comparison, recipes: dict[str, Recipe]) -> None:
    """Read all that will be asked, so that nothing is trained for a set that cannot be asked."""
    seeing = [one for one in comparison.evaluation if one.modality == "image"]
    read_text_sets([one for one in comparison.evaluation if one.modality == "text"])
    if seeing:
        read_vision_sets(seeing)
    for one in seeing:
        for name, recipe in recipes.items():
            if one.workflow not in (None, recipe.workflow or "mm"):
                raise UsageError(
                    f"set {one.name!r} asks workflow {one.workflow!r}, and arm {name!r} has "
                    f"{recipe.workflow or 'mm'!r}; leave workflow out of the set"
                )
    if comparison.iit is not None and comparison.iit.path is not None:
        read_dialogues(Path(comparison.iit.path))
    if comparison.laws is not None:
        read_items(comparison.laws.items())


def _stages(recipe: Recipe, reader: StageData) -> tuple[StagePlan, ...]:
    planned = []
    for stage in recipe.stages:
        found = reader.rows(stage.data or [], recipe.seed, stage.image_share)
        rows = len(found) - check_rows(found, stage.name, stage.text_rows)
        an_epoch = ceil(ceil(rows / stage.batch_size) / stage.accumulate)
        epochs = None if stage.max_steps else stage.epochs or 1
        together = stage.batch_size * stage.accumulate
        planned.append(
            StagePlan(
                name=stage.name,
                trains=tuple(stage.train),
                rows=rows,
                rows_a_step=None if stage.packing else together,
                steps=stage.max_steps
                or (None if stage.packing else ceil(an_epoch * (stage.epochs or 1))),
                sequences_a_step=together,
                shown=epochs,
                packed=stage.max_length if stage.packing else None,
            )
        )
    return tuple(planned)


def _limited(comparison: Comparison, limit: int | None) -> Comparison:
    if limit is None:
        return comparison
    sets = [
        one.model_copy(update={"limit": min(limit, one.limit or limit)})
        for one in comparison.evaluation
    ]
    laws = comparison.laws
    if laws is not None:
        laws = laws.model_copy(update={"limit": min(limit, laws.limit)})
    iit = comparison.iit
    if iit is not None:
        iit = iit.model_copy(update={"count": min(limit, iit.count)})
    return comparison.model_copy(update={"evaluation": sets, "iit": iit, "laws": laws})


def _done(run: Path) -> tuple[Phase, ...]:
    records = [read_phase(run, phase) for phase in PHASES]
    return tuple(record.phase for record in records if record is not None and record.done)


def _in_arm(name: str, work: Any) -> Any:
    try:
        return work()
    except UsageError as error:
        raise UsageError(f"arm {name!r}: {error}") from error
