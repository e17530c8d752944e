"""What an estimate is made for: a run or a recipe, with changes, and rows or their length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmgraft.basefiles import ModelFiles
from mmgraft.basefiles.files import fetch_tokenizer
from mmgraft.data.bad_rows import OnBadRow
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.model.files.processor import load_processor
from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.recipes.source import find_recipe, load_recipe, with_data
from mmgraft.training.distributed import parallel
from mmgraft.training.memory.estimate import Estimator
from mmgraft.training.memory.rows import RowSizes, assumed, measured
from mmgraft.training.memory.subject import Subject, subject_of_recipe, subject_of_run
from mmgraft.training.run import RECIPE, USED_RECIPE, Plan, recipe_file
from mmgraft.training.stage_data import StageData, check_rows, with_template


@dataclass(frozen=True)
class Request:
    """A recipe that is to be estimated, resolved, with all that the estimate needs."""

    recipe: Recipe
    subject: Subject
    rows: list[RowSizes]
    device: str
    processes: int = 1

    def estimator(self) -> Estimator:
        """Ready to estimate the recipe and its variations."""
        return Estimator(self.subject, self.rows, self.device, self.processes)


def read_request(
    target: str | Path,
    *,
    recipe: str | Path | None = None,
    base: str | None = None,
    vision: str | None = None,
    data: Sequence[str] = (),
    images: str | None = None,
    overrides: Sequence[str] = (),
    length: int | None = None,
    device: str = "cuda",
    processes: int = 1,
) -> Request:
    """Read what an estimate needs; of base and tower that is configs and tokenizer only.

    Args:
        target: The folder of a graft, or a recipe's file or shipped name.
        recipe: For a run, instead of its own.
        base: Alias, Hub id or folder, instead of the graft's or the recipe's.
        vision: A tower, likewise.
        data: ``FILE`` or ``STAGE=FILE``, instead of the recipe's.
        images: Folder that image paths start from.
        overrides: ``key=value`` texts for the recipe.
        length: Positions of a row, images counted; then no data are read.
        device: ``cuda`` or ``cpu``.
        processes: How many train together, in the way of the recipe's `parallel`.

    Raises:
        UsageError: Anything that is not there or does not fit, with what to do instead.
    """
    path = Path(target).expanduser()
    if path.is_dir():
        subject = subject_of_run(path, base, vision)
        if recipe is None and not (path / RECIPE).is_file() and (path / USED_RECIPE).is_file():
            recipe = path / USED_RECIPE
        file = recipe_file(path, subject.record, recipe)
        loaded = load_recipe(file, method=subject.record.method, overrides=overrides)
    else:
        if recipe is not None:
            raise UsageError(f"{target} is a recipe itself; leave --recipe out, or name a run")
        loaded = load_recipe(find_recipe(target), overrides=overrides)
        subject = subject_of_recipe(loaded, base, vision)
    resolved = with_data(loaded, data, images).resolved(subject.record.workflow)
    reader = _Reader(subject, resolved.on_bad_row)
    rows = [reader.sizes(stage, length, resolved.seed) for stage in resolved.stages]
    return Request(resolved, subject, rows, device, processes)


def estimator_of_plan(plan: Plan) -> Estimator:
    """Make one for a training that is about to begin, whose rows are read already."""
    subject = subject_of_run(plan.run)
    reader = _Reader(subject, plan.recipe.on_bad_row)
    sizes = [
        reader.of_rows(rows, stage) for stage, rows in zip(plan.stages, plan.rows, strict=True)
    ]
    return Estimator(subject, sizes, plan.device, parallel.processes())


class _Reader:
    """Sizes of rows, from data where a stage names them."""

    def __init__(self, subject: Subject, on_bad_row: OnBadRow) -> None:
        self.subject = subject
        self.on_bad_row = on_bad_row
        self.data = StageData(on_bad_row)
        self._plain: GraftProcessor | None = None

    def sizes(self, stage: Stage, length: int | None, seed: int) -> RowSizes:
        if length is not None:
            return assumed(length, self.subject.positions.fixed, "--length", stage.packing)
        entries = stage.data or []
        if entries and all(entry.path for entry in entries):
            rows = self.data.rows(entries, seed, stage.image_share)
            check_rows(rows, stage.name, stage.text_rows)
            return self.of_rows(rows, stage)
        if stage.max_length is not None:
            source = "max_length; no data are named"
            return assumed(stage.max_length, self.subject.positions.fixed, source, stage.packing)
        raise UsageError(
            f"stage {stage.name!r} names neither data nor max_length: give --length, the positions "
            "of a row with its image, or --data FILE"
        )

    def of_rows(self, rows: Sequence[Row], stage: Stage) -> RowSizes:
        """Measure rows that are read already."""
        skip_bad = self.on_bad_row == "skip"
        sizes = stage.max_length, stage.text_rows, stage.packing
        return measured(rows, self.processor(stage), *sizes, skip_bad)

    def processor(self, stage: Stage) -> GraftProcessor:
        if self._plain is None:
            folder = _tokenizer_folder(self.subject.files)
            self._plain = load_processor(self.subject.record, folder, self.subject.shape)
        return with_template(self._plain, stage.template)


def _tokenizer_folder(files: ModelFiles) -> Path:
    if Path(files.id).is_absolute() or files.id.startswith("./"):
        return files.path
    return fetch_tokenizer(files.id, files.revision)
