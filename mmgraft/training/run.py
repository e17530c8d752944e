"""A run: every stage of a recipe, one after another, with what is needed to go on after a stop."""

import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.atomic import atomic_json, atomic_text
from mmgraft.data.formats.indexed import Joined
from mmgraft.data.rows import BAD_ROWS, BadRowLog
from mmgraft.errors import MMGraftError, UsageError, is_out_of_memory
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import base_files, load_processor
from mmgraft.progress import say
from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.recipes.source import dump_recipe, load_recipe, with_data, with_max_steps
from mmgraft.runs.packages import versions_of
from mmgraft.runs.results import put_all_aside
from mmgraft.training import checkpoint, stage_data
from mmgraft.training.callbacks import metrics, text_change
from mmgraft.training.callbacks.stopping import with_way_on
from mmgraft.training.devices import check_packages, is_main_rank, pick_device, with_workers
from mmgraft.training.distributed.parallel import check_count, check_parallel, processes, way_on
from mmgraft.training.memory.shortage import out_of_memory
from mmgraft.training.plan import USED_RECIPE, Plan, recipe_file
from mmgraft.version import __version__

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from mmgraft.training.session import Session

VERSIONS = "versions.json"

Announce = Callable[[str], None]
Display = Callable[[Stage, int, int], "Sequence[TrainerCallback]"]


@dataclass
class StageResult:
    """Result of one stage in this session."""

    stage: str
    steps: int
    loss: float | None
    seconds: float
    rows: int
    text_rows_skipped: int
    trained_parameters: int
    bad_rows: int


def plan_training(
    run: Path | str,
    *,
    recipe: str | Path | None = None,
    data: Sequence[str] | None = None,
    images: str | None = None,
    read: Sequence[str] | None = None,
    overrides: Sequence[str] | None = None,
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
        images, read: Folder of the images, and ``KEY=VALUE`` of the entries, of these files.
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
    if resume:
        _check_resume(run, restart, changes=bool(recipe or overrides or max_steps))
    progress = None if restart else checkpoint.read_progress(run)
    file = _check_progress(run, progress, resume) or recipe_file(run, record, recipe)
    loaded = load_recipe(file, method=record.method, overrides=overrides)
    loaded = with_max_steps(with_data(loaded, data, images, read), max_steps)
    stage_data.check_data_is_set(loaded, run, file)
    loaded, device = with_workers(loaded, pick_device(device))
    plan = Plan(run, record, loaded.resolved(record.workflow), device, resume=resume)
    check_packages(loaded, plan.device)
    check_parallel(loaded, plan.device, count or processes())
    if resume and progress is not None:
        check_count(run, progress, count or processes())
        plan.first = len(progress["finished"])
    _check_graft(run, record, loaded)
    _read_rows(plan)
    return plan


def _read_rows(plan: Plan) -> None:
    """Read and check the rows of all stages; those of a resumed run must be the same as before."""
    run, recipe = plan.run, plan.recipe
    left_out = BadRowLog(run).left_out(None) if plan.resume else None
    reader = stage_data.StageData(recipe.on_bad_row, left_out)
    for stage in plan.stages:
        rows = reader.rows(stage.data or [], recipe.seed, stage.image_share)
        plan.skipped.append(stage_data.check_rows(rows, stage.name, stage.text_rows))
        plan.rows.append(rows)
    plan.eval_rows = reader.rows(recipe.eval_data, 0) if recipe.eval_every else []
    plan.bad = reader.bad
    begun_with = checkpoint.read_rows(run) if plan.resume else {}
    for stage, rows in zip(plan.stages[plan.first :], plan.rows[plan.first :], strict=True):
        stage_data.refuse_other_rows(rows, begun_with.get(stage.name), stage.name, run)
    if recipe.on_bad_row == "error":
        stage_data.check_images(Joined([*plan.rows[plan.first :], plan.eval_rows]))


def train(
    plan: Plan, announce: Announce = say, display: Display = lambda *_: ()
) -> list[StageResult]:
    """Train all stages that are left, saving the graft after each.

    Args:
        plan: From :func:`plan_training`.
        announce: Is called with a sentence when something happens.
        display: Callbacks that show a stage's progress, given the stage, its number and how many
            there are.

    Raises:
        TrainingStopped: Ctrl-C; a checkpoint is written.
        MMGraftError: A full disk, too little memory, or a loss that is not finite; what was saved
            is whole.
    """
    from mmgraft.training.session import Session

    run, main = plan.run, is_main_rank()
    session = Session(plan, announce)
    watches_text = main and any(stage.trains_base for stage in plan.stages)
    if plan.resume and main:  # a kill may have come before these were removed
        for index, stage in enumerate(plan.stages[: plan.first]):
            shutil.rmtree(checkpoint.stage_folder(run, index, stage.name), ignore_errors=True)
    if plan.first >= len(plan.stages):
        if watches_text and text_change.is_due(run):
            session.measure_text()
        announce(f"all stages of {run} are trained; --restart trains it further")
        return []
    session.load()  # which checks the base, before anything of an earlier training is put away
    if main:
        _begin(plan)
        session.bad_rows.put(plan.bad)
    if watches_text:
        text_change.remember(run, session.model, session.processor)
    results: list[StageResult] = []
    for index in range(plan.first, len(plan.stages)):
        if session.stopper.requested:
            raise session.stopped(f"after stage {plan.stages[index - 1].name!r}")
        results.append(_run_stage(session, index, display))
    if watches_text:
        session.measure_text()
    return results


def _run_stage(session: "Session", index: int, display: Display) -> StageResult:
    """Train one stage; what goes wrong on disk or in memory is said with the way on."""
    plan, began = session.plan, time.monotonic()
    stage = plan.stages[index]
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
            explained = with_way_on(error, plan.run, stage.name)
            if explained is None:
                raise
            raise explained from error
    return StageResult(
        stage=stage.name,
        steps=steps,
        loss=loss,
        seconds=time.monotonic() - began,
        rows=len(plan.rows[index]) - plan.skipped[index],
        text_rows_skipped=plan.skipped[index],
        trained_parameters=parameters,
        bad_rows=session.bad_rows.count(stage.name),
    )


def _begin(plan: Plan) -> None:
    """Put away what an earlier training has left in a run that begins, and record this one."""
    if plan.resume:
        return
    run, recipe = plan.run, plan.recipe
    shutil.rmtree(run / checkpoint.FOLDER, ignore_errors=True)
    (run / text_change.BEFORE).unlink(missing_ok=True)
    metrics.put_aside(run)
    put_all_aside(run)  # they measured the graft as it was
    (run / BAD_ROWS).unlink(missing_ok=True)
    atomic_text(run / USED_RECIPE, dump_recipe(stage_data.absolute(recipe)))
    atomic_json(run / VERSIONS, versions())
    names = [stage.name for stage in recipe.stages]
    known = dict(zip(names, map(stage_data.fingerprint, plan.rows), strict=True))
    checkpoint.write_progress(run, known, checkpoint.ROWS)
    begun = {"recipe": recipe.name, "processes": processes(), "stages": names, "finished": []}
    checkpoint.write_progress(run, begun)


def versions() -> dict[str, str]:
    """Collect the versions of what a run is computed with."""
    packages = ("torch", "transformers", "accelerate", "safetensors", "bitsandbytes")
    return {
        "mmgraft": __version__,
        "python": platform.python_version(),
        **versions_of(packages),
        "platform": platform.platform(),
    }


def _check_resume(run: Path, restart: bool, changes: bool) -> None:
    if restart:
        raise UsageError("--resume goes on and --restart begins anew; give one of them")
    if changes:
        raise UsageError(
            f"--resume goes on exactly, with {run / USED_RECIPE}; leave --recipe, --set and "
            "--max-steps out, or begin anew with --restart"
        )


def _check_progress(run: Path, progress: dict[str, Any] | None, resume: bool) -> Path | None:
    """Refuse to go on with nothing, or to begin over something; return the recipe to go on with."""
    if resume:
        if progress is None or not (run / USED_RECIPE).is_file():
            way = f"mmgraft train {run}"
            raise UsageError(f"{run} has no training to go on with; begin with: {way}")
        return run / USED_RECIPE
    if progress is None or not is_main_rank():
        return None  # another rank may find what the first one has just begun
    finished, stages = progress["finished"], progress.get("stages", [])
    if not finished and not any((run / checkpoint.FOLDER).glob("*/checkpoint-*")):
        return None  # it ended before anything was saved, so there is nothing to lose
    if len(finished) < len(stages):
        way = way_on(run, progress.get("processes", 1))
        raise UsageError(
            f"a training of {run} stopped in stage {stages[len(finished)]!r}; go on with: {way}\n"
            "or begin anew, from the graft as it is now, with --restart"
        )
    raise UsageError(
        f"{run} is trained already ({len(stages)} stages of {progress.get('recipe')}); train it "
        "further, from the graft as it is now, with --restart"
    )


def _check_graft(run: Path, record: GraftFile, recipe: Recipe) -> None:
    why = record.promises.training
    if why:
        raise UsageError(f"{record.method} is not trained: {why}")
    packed = next((one.name for one in recipe.stages if one.packing and one.graft_active), None)
    if packed is not None and (why := record.promises.packing):
        raise UsageError(
            f"stage {packed!r}: this {record.method} cannot hold several rows in one sequence: "
            f"{why}. Leave packing out; group_by: length saves padding too."
        )
    if recipe.template_options or any(one.template for one in recipe.stages):
        base = base_files(record, run).path  # its template must know each option
        processor = load_processor(record, base, None, recipe.template_options)
        for stage in recipe.stages:
            stage_data.with_template(processor, stage.template)
    if record.base_trained and recipe.quantization is not None:
        raise MMGraftError("a base of its own in 4-bit is not trained; leave quantization out")
