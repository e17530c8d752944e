"""A run: every stage of a recipe, one after another, with what is needed to go on after a stop."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmgraft
from mmgraft.atomic import atomic_json, atomic_text
from mmgraft.data import bad_rows
from mmgraft.data.bad_rows import BadRow, BadRowLog
from mmgraft.data.formats.indexed import Joined, facts_of
from mmgraft.data.rows import Row
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.recipes.source import (
    dump_recipe,
    find_recipe,
    load_recipe,
    method_recipe,
    with_data,
    with_max_steps,
)
from mmgraft.runs.sections import put_all_aside
from mmgraft.training import checkpoint
from mmgraft.training.callbacks import metrics, text_change
from mmgraft.training.callbacks.stopping import with_way_on
from mmgraft.training.devices import check_packages, is_main_rank, pick_device
from mmgraft.training.distributed.parallel import (
    check_count,
    check_parallel,
    check_rows_have_images,
    processes,
    way_on,
)
from mmgraft.training.memory.shortage import is_out_of_memory, out_of_memory
from mmgraft.training.stage_data import (
    StageData,
    absolute,
    check_data_is_set,
    check_pictures,
    check_rows,
    fingerprint,
    refuse_other_rows,
)

if TYPE_CHECKING:
    from transformers import TrainerCallback

RECIPE = "recipe.yaml"
"""What `mmgraft graft` writes into a run, for its owner to change."""
USED_RECIPE = "recipe.used.yaml"
"""The recipe that the run is trained by, every setting resolved; `--resume` goes on with it."""
VERSIONS = "versions.json"

Announce = Callable[[str], None]
Display = Callable[[Stage, int, int], "Sequence[TrainerCallback]"]


@dataclass
class StageResult:
    """What one stage did in this session."""

    stage: str
    steps: int
    loss: float | None
    seconds: float
    rows: int
    text_rows_skipped: int
    trained_parameters: int
    bad_rows: int


@dataclass
class Plan:
    """A training that has been checked and can begin."""

    run: Path
    record: GraftFile
    recipe: Recipe  # resolved
    device: str
    rows: list[Sequence[Row]]
    skipped: list[int]
    eval_rows: Sequence[Row] = ()
    bad: list[BadRow] = field(default_factory=list)  # left out, and in no log yet
    first: int = 0
    resume: bool = False

    @property
    def in_pieces(self) -> bool:
        """Whether several processes hold the model in pieces that mmgraft makes."""
        return self.recipe.parallel == "fsdp2" and processes() > 1

    @property
    def stages(self) -> list[Stage]:
        """All stages of the recipe."""
        return self.recipe.stages


def plan_training(
    run: Path | str,
    *,
    recipe: str | Path | None = None,
    data: Sequence[str] = (),
    images: str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    restart: bool = False,
    max_steps: int | None = None,
    device: str | None = None,
    count: int | None = None,
) -> Plan:
    """Check everything that can be checked before a model is loaded; nothing is written.

    Args:
        run: The folder of a graft.
        recipe: A path or the name of a shipped recipe; default: the run's own.
        data: ``FILE`` for all stages or ``STAGE=FILE``, instead of the recipe's data.
        images: Folder that image paths start from.
        overrides: ``key=value`` texts.
        resume: Go on with the recipe that the run was begun with.
        restart: Train a run that was trained before, from its graft as it is now.
        max_steps: End every stage after so many steps.
        device: ``cuda``, ``mps`` or ``cpu``; default: the first that is there.
        count: Processes that would train together; default: those that there are.

    Raises:
        UsageError: Anything that could not work, with what to do instead.
    """
    run = Path(run)
    record = GraftFile.read(run)
    progress = checkpoint.read_progress(run) if not restart else None
    if resume and restart:
        raise UsageError("--resume goes on and --restart begins anew; give one of them")
    if resume:
        loaded, file = _resumed_recipe(run, record, progress, recipe, overrides, max_steps)
    else:
        _refuse_second_training(run, progress)
        file = recipe_file(run, record, recipe)
        loaded = load_recipe(file, method=record.method, overrides=overrides)
    loaded = with_data(loaded, data, images)
    if max_steps is not None:
        loaded = with_max_steps(loaded, max_steps)
    check_data_is_set(loaded, run, file)
    chosen = pick_device(device)
    check_packages(loaded, chosen)
    count = count or processes()
    check_parallel(loaded, chosen, count)
    if resume:
        check_count(run, progress, count)
    _check_graft(record, loaded)
    resolved = loaded.resolved(record.workflow)
    left_out = BadRowLog(run).left_out(None) if resume else None
    reader = StageData(resolved.on_bad_row, left_out)
    rows: list[Sequence[Row]] = []
    skipped: list[int] = []
    for stage in resolved.stages:
        found = reader.rows(stage.data or [], resolved.seed, stage.image_share)
        skipped.append(check_rows(found, stage.name, stage.text_rows))
        rows.append(found)
    evaluated = reader.rows(resolved.eval_data, 0) if resolved.eval_every else []
    for stage, found in zip(resolved.stages, rows, strict=True):
        if stage.text_rows != "skip":
            shown = facts_of(Joined([found, evaluated])).with_image
            check_rows_have_images(resolved, stage.name, int((~shown).sum()), count)
    first = len(progress["finished"]) if resume and progress is not None else 0
    if resume:
        begun_with = checkpoint.read_rows(run)
        for stage, found in zip(resolved.stages[first:], rows[first:], strict=True):
            refuse_other_rows(found, begun_with.get(stage.name), stage.name, run)
    if resolved.on_bad_row == "error":
        check_pictures(Joined([*rows[first:], evaluated]))
    return Plan(run, record, resolved, chosen, rows, skipped, evaluated, reader.bad, first, resume)


def train(
    plan: Plan, announce: Announce = lambda text: None, display: Display = lambda *_: ()
) -> list[StageResult]:
    """Train all stages that are left, saving the graft after each.

    Args:
        plan: From :func:`plan_training`.
        announce: Told in sentences what goes on.
        display: Callbacks that show a stage's progress, given the stage, its number and how many
            there are.

    Raises:
        TrainingStopped: Ctrl-C; a checkpoint is written.
        MMGraftError: A full disk, too little memory, or a loss that is not finite; what was saved
            is whole.
    """
    from mmgraft.training.session import Session

    run = plan.run
    trains_base = any(stage.trains_base for stage in plan.stages)
    if plan.resume and is_main_rank():  # a kill may have come before these were removed
        for index, stage in enumerate(plan.stages[: plan.first]):
            checkpoint.remove(checkpoint.stage_folder(run, index, stage.name))
    if plan.first >= len(plan.stages):
        if trains_base and is_main_rank() and text_change.is_due(run):
            Session(plan, announce).measure_text()
        announce(f"all stages of {run} are trained; --restart trains it further")
        return []
    session = Session(plan, announce)
    session.load()  # which checks the base, before anything of an earlier training is put away
    if not plan.resume:
        _begin(run, plan.recipe, plan.rows)
    if is_main_rank():
        session.bad_rows.put(plan.bad)
    if trains_base and is_main_rank():
        session.remember_text()
    results: list[StageResult] = []
    for index in range(plan.first, len(plan.stages)):
        stage = plan.stages[index]
        began = time.monotonic()
        with ExitStack() as stack:
            callbacks = list(display(stage, index + 1, len(plan.stages)))
            for callback in callbacks:
                stack.callback(getattr(callback, "close", lambda: None))
            try:
                steps, loss, parameters = session.run_stage(index, callbacks)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise out_of_memory(plan.recipe, stage, error) from error
            except (OSError, MMGraftError) as error:
                told = with_way_on(error, run, stage.name)
                if told is None:
                    raise
                raise told from error
        results.append(
            StageResult(
                stage.name,
                steps,
                loss,
                time.monotonic() - began,
                len(plan.rows[index]) - plan.skipped[index],
                plan.skipped[index],
                parameters,
                session.bad_rows.count(stage.name),
            )
        )
        if session.stop_requested and index + 1 < len(plan.stages):
            raise session.stopped(f"after stage {stage.name!r}")
    if trains_base and is_main_rank():
        session.measure_text()
    return results


def _begin(run: Path, recipe: Recipe, rows: Sequence[Sequence[Row]]) -> None:
    if not is_main_rank():
        return
    shutil.rmtree(run / checkpoint.FOLDER, ignore_errors=True)
    (run / text_change.BEFORE).unlink(missing_ok=True)
    metrics.put_aside(run)
    put_all_aside(run)  # they measured the graft as it was
    (run / bad_rows.FILE).unlink(missing_ok=True)
    atomic_text(run / USED_RECIPE, dump_recipe(absolute(recipe)))
    atomic_json(run / VERSIONS, versions())
    names = [stage.name for stage in recipe.stages]
    checkpoint.write_rows(run, dict(zip(names, map(fingerprint, rows), strict=True)))
    checkpoint.write_progress(
        run,
        {
            "recipe": recipe.name,
            "processes": processes(),
            "stages": names,
            "finished": [],
        },
    )


def versions() -> dict[str, str]:
    """Versions of what a run was computed with."""
    found = {"mmgraft": mmgraft.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "safetensors", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "platform": platform.platform()}


def recipe_file(run: Path, record: GraftFile, named: str | Path | None) -> Path:
    """The recipe of a run: the one that is named, else its own, else its method's."""
    if named is not None:
        return find_recipe(named)
    if (run / RECIPE).is_file():
        return run / RECIPE
    default = method_recipe(get_method(record.method))
    if default is None:
        raise UsageError(
            f"{run} has no {RECIPE}, and the method {record.method} brings none; give --recipe FILE"
        )
    return default


def _resumed_recipe(
    run: Path,
    record: GraftFile,
    progress: dict[str, Any] | None,
    recipe: str | Path | None,
    overrides: Sequence[str],
    max_steps: int | None,
) -> tuple[Recipe, Path]:
    file = run / USED_RECIPE
    if progress is None or not file.is_file():
        raise UsageError(f"{run} has no training to go on with; begin with: mmgraft train {run}")
    if recipe is not None or overrides or max_steps is not None:
        raise UsageError(
            f"--resume goes on exactly, with {file}; leave --recipe, --set and --max-steps out, or "
            "begin anew with --restart"
        )
    return load_recipe(file, method=record.method), file


def _refuse_second_training(run: Path, progress: dict[str, Any] | None) -> None:
    if progress is None or not is_main_rank():
        return  # another rank may find what the first one has just begun
    finished, stages = progress["finished"], progress.get("stages", [])
    if not finished and not any((run / checkpoint.FOLDER).glob("*/checkpoint-*")):
        return  # it ended before anything was saved, so there is nothing to lose
    if len(finished) < len(stages):
        where = stages[len(finished)]
        way = way_on(run, progress.get("processes", 1))
        raise UsageError(
            f"a training of {run} stopped in stage {where!r}; go on with: {way}\n"
            "or begin anew, from the graft as it is now, with --restart"
        )
    raise UsageError(
        f"{run} is trained already ({len(stages)} stages of {progress.get('recipe')}); train it "
        "further, from the graft as it is now, with --restart"
    )


def _check_graft(record: GraftFile, recipe: Recipe) -> None:
    why = record.promises.training
    if why:
        raise UsageError(f"{record.method} is not trained: {why}")
    if record.base_trained and recipe.quantization is not None:
        raise MMGraftError("a base of its own in 4-bit is not trained; leave quantization out")
