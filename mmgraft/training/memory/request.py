"""Subject of an estimate: a run or a recipe, with changes, and rows or their length."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from mmgraft.basefiles.files import SMALL, fetch
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.model.files.load import load_processor
from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.recipes.source import find_recipe, load_recipe, with_data
from mmgraft.training.distributed import parallel
from mmgraft.training.memory import estimate as estimates
from mmgraft.training.plan import RECIPE, USED_RECIPE, Plan, recipe_file
from mmgraft.training.stage_data import StageData, check_rows, with_template


def read_request(
    target: str | Path,
    *,
    recipe: str | Path | None = None,
    base: str | None = None,
    vision: str | None = None,
    data: Sequence[str] | None = None,
    images: str | None = None,
    read: Sequence[str] | None = None,
    overrides: Sequence[str] | None = None,
    length: int | None = None,
    device: str = "cuda",
    processes: int = 1,
) -> estimates.Estimator:
    """Read what an estimate needs; of base and tower that is configs and tokenizer only.

    Args:
        target: The folder of a graft, or a recipe's file or shipped name.
        recipe: For a run, instead of its own.
        base: Alias, Hub id or folder, instead of the graft's or the recipe's.
        vision: A tower, likewise.
        data: ``FILE`` or ``STAGE=FILE``, instead of the recipe's.
        images: Folder that image paths start from.
        read: ``KEY=VALUE`` of the entries of the files in ``data``.
        overrides: ``key=value`` texts for the recipe.
        length: Positions of a row, images counted; then no data are read.
        device: ``cuda`` or ``cpu``.
        processes: How many train together, in the way of the recipe's ``parallel``.

    Raises:
        UsageError: Anything that is not there or does not fit, with what to do instead.
    """
    path = Path(target).expanduser()
    if path.is_dir():
        subject = estimates.subject_of_run(path, base, vision)
        if recipe is None and not (path / RECIPE).is_file() and (path / USED_RECIPE).is_file():
            recipe = path / USED_RECIPE
        file = recipe_file(path, subject.record, recipe)
        loaded = load_recipe(file, method=subject.record.method, overrides=overrides)
    else:
        if recipe is not None:
            raise UsageError(f"{target} is a recipe itself; leave --recipe out, or name a run")
        loaded = load_recipe(find_recipe(target), overrides=overrides)
        subject = estimates.subject_of_recipe(loaded, base, vision)
    resolved = with_data(loaded, data, images, read).resolved(subject.record.workflow)
    reader = _Reader(subject, resolved)
    rows = [reader.sizes(stage, length, resolved.seed) for stage in resolved.stages]
    return estimates.Estimator(resolved, subject, rows, device, processes)


def estimator_of_plan(plan: Plan) -> estimates.Estimator:
    """Make one for a training that is about to begin, whose rows are read already."""
    subject = estimates.subject_of_run(plan.run)
    reader = _Reader(subject, plan.recipe)
    sizes = [
        reader.of_rows(rows, stage) for stage, rows in zip(plan.stages, plan.rows, strict=True)
    ]
    return estimates.Estimator(plan.recipe, subject, sizes, plan.device, parallel.processes())


class _Reader:
    """Sizes of rows, from data where a stage names them."""

    def __init__(self, subject: estimates.Subject, recipe: Recipe) -> None:
        self.subject, self.recipe = subject, recipe
        self.data = StageData(recipe.on_bad_row)

    def sizes(self, stage: Stage, length: int | None, seed: int) -> estimates.RowSizes:
        entries = stage.data or []
        if length is None and entries and all(entry.path for entry in entries):
            rows = self.data.rows(entries, seed, stage.image_share)
            check_rows(rows, stage.name, stage.text_rows)
            return self.of_rows(rows, stage)
        source = "max_length; no data are named" if length is None else "--length"
        length = stage.max_length if length is None else length
        if length is None:
            raise UsageError(
                f"stage {stage.name!r} names neither data nor max_length: give --length, the "
                "positions of a row with its image, or --data FILE"
            )
        return estimates.assumed(length, self.subject.positions.fixed, source, stage.packing)

    def of_rows(self, rows: Sequence[Row], stage: Stage) -> estimates.RowSizes:
        """Measure rows that are read already."""
        processor = with_template(self.processor, stage.template)
        skip_bad = self.recipe.on_bad_row == "skip"
        sizes = stage.max_length, stage.text_rows, stage.packing
        return estimates.measured(rows, processor, *sizes, skip_bad)

    @cached_property
    def processor(self) -> GraftProcessor:
        files = self.subject.files
        local = Path(files.id).is_absolute() or files.id.startswith("./")
        folder = files.path if local else fetch(files.id, files.revision, SMALL)
        options = self.recipe.template_options
        return load_processor(self.subject.record, folder, self.subject.shape, options)
