"""What reads a file of rows, or the rows of a run: tokenizer, template, image positions, length."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer

from mmgraft.aliases import resolve_alias
from mmgraft.anatomy import skeleton
from mmgraft.anatomy.positions import position_table
from mmgraft.basefiles import ModelFiles, load_config, resolve
from mmgraft.data.chat.placeholder import choose_placeholder
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.template import resolve_template
from mmgraft.data.formats.shards import is_there
from mmgraft.errors import UsageError, did_you_mean
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import base_files, local_tower
from mmgraft.model.files.processor import load_processor
from mmgraft.recipes.recipe import DataEntry, Recipe
from mmgraft.recipes.source import find_recipe, load_recipe
from mmgraft.runs.find import is_graft
from mmgraft.training.run import recipe_file
from mmgraft.training.stage_data import check_data_is_set
from mmgraft.vision.projectors.configs import MlpConfig
from mmgraft.vision.towers.registry import describe_tower


@dataclass(frozen=True)
class Asked:
    """What a user named.

    Attributes:
        target: a file of rows, or the folder of a run.
        run: reads a file as this run would.
        base: reads it with this base's tokenizer instead; needs `vision`.
        vision: the tower that says how many positions an image has.
        recipe: instead of the run's.
        stage: of the recipe; None takes all.
        images: folder that image paths start from.
        template: instead of the graft's and the stages'.
        max_length: instead of the stages'.
    """

    target: Path
    run: Path | None = None
    base: str | None = None
    vision: str | None = None
    recipe: str | None = None
    stage: str | None = None
    images: Path | None = None
    template: str | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class View:
    """Rows, and what reads them in some stages.

    Attributes:
        entries: files of rows.
        stages: that read them so; none for a file by itself.
        processor: None where no tokenizer is known.
        max_length: where rows are cut.
        skip_text: rows without an image are left out.
        positions: that the base has a table of; None where it has none, or is not known.
    """

    entries: tuple[DataEntry, ...]
    stages: tuple[str, ...] = ()
    processor: GraftProcessor | None = field(default=None, compare=False)
    max_length: int | None = None
    skip_text: bool = False
    positions: int | None = None


def views(asked: Asked) -> list[View]:
    """How the rows that a user named are read: once for stages that read them alike.

    Raises:
        UsageError: Something that is not there, or options that do not go together.
    """
    run, file = _run_and_file(asked)
    record = GraftFile.read(run) if run is not None else None
    recipe = _recipe(asked, run, record)
    base = _base(asked, run, record, recipe)
    processor = _processor(asked, run, record, recipe, base)
    positions = None if base is None else _positions(base)
    given = None
    if file is not None:
        images = None if asked.images is None else str(asked.images)
        given = (DataEntry(path=str(file), images=images),)
    if recipe is None:
        assert given is not None
        if processor is not None and asked.template is not None:
            processor = _with_template(processor, asked.template)
        return [View(given, (), processor, asked.max_length, positions=positions)]
    if given is None and run is not None:
        check_data_is_set(recipe, run, _file_of(asked, run, record))
    found: dict[tuple[object, ...], View] = {}
    for stage in recipe.stages:
        if asked.stage not in (None, stage.name):
            continue
        entries = given or tuple(_placed(entry, asked) for entry in stage.data or [])
        template = asked.template or stage.template
        length = asked.max_length or stage.max_length
        skips = stage.text_rows == "skip"
        key = (repr(entries), template, length, skips)
        stages = (*found[key].stages, stage.name) if key in found else (stage.name,)
        reads = processor
        if processor is not None and template is not None:
            reads = _with_template(processor, template)
        found[key] = View(entries, stages, reads, length, skips, positions)
    if not found:
        names = [stage.name for stage in recipe.stages]
        raise UsageError(f"no stage {asked.stage!r}; {did_you_mean(str(asked.stage), names)}")
    return list(found.values())


def _run_and_file(asked: Asked) -> tuple[Path | None, Path | None]:
    target = asked.target
    if target.is_dir() and not (is_there(str(target)) and not is_graft(target)):
        if not is_graft(target):
            raise UsageError(
                f"{target} is neither a file of rows nor the folder of a graft or of shards; give "
                "one of them, or a pattern of files"
            )
        if asked.run is not None:
            raise UsageError(f"{target} is a run itself; give --run beside a file of rows")
        run, file = target, None
    else:
        if not is_there(str(target)):
            raise UsageError(
                f"no file and no run {target}; give a LLaVA json, a messages jsonl, or the folder "
                "of a graft"
            )
        run, file = asked.run, target
    if run is not None and (asked.base or asked.vision):
        raise UsageError(f"the run {run} names its base and tower; leave --base and --vision out")
    if asked.stage is not None and run is None and asked.recipe is None:
        raise UsageError("--stage is of a recipe; give --run or --recipe as well")
    return run, file


def _file_of(asked: Asked, run: Path, record: GraftFile | None) -> Path:
    assert record is not None
    return recipe_file(run, record, asked.recipe)


def _recipe(asked: Asked, run: Path | None, record: GraftFile | None) -> Recipe | None:
    if run is not None and record is not None:
        loaded = load_recipe(_file_of(asked, run, record), method=record.method)
        return loaded.resolved(record.workflow)
    if asked.recipe is None:
        return None
    return load_recipe(find_recipe(asked.recipe)).resolved()


def _base(
    asked: Asked, run: Path | None, record: GraftFile | None, recipe: Recipe | None
) -> ModelFiles | None:
    """The base of a run, or the one that is named; None where none is."""
    if run is not None and record is not None:
        return base_files(record, run)
    named = asked.base or (recipe.graft.base if recipe is not None else None)
    if named is None:
        return None
    if _vision(asked, recipe) is None:
        raise UsageError("--base without --vision; name the tower too, for an image's positions")
    return resolve(resolve_alias(named))


def _vision(asked: Asked, recipe: Recipe | None) -> str | None:
    return asked.vision or (recipe.graft.vision if recipe is not None else None)


def _positions(base: ModelFiles) -> int | None:
    """See :func:`mmgraft.anatomy.positions.position_table`; no weights are read."""
    try:
        config = load_config(base)
        return position_table(skeleton(config), config.get_text_config(decoder=True))
    except UsageError:
        return None  # no text model: the rows are told of all the same, and no graft is made on it


def _processor(
    asked: Asked,
    run: Path | None,
    record: GraftFile | None,
    recipe: Recipe | None,
    base: ModelFiles | None,
) -> GraftProcessor | None:
    """A run's, or that of a base and a tower; no weights are read."""
    if base is None:
        return None
    if run is not None and record is not None:
        return load_processor(record, base.path, describe_tower(local_tower(record, run)))
    vision = _vision(asked, recipe)
    assert vision is not None
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the base {base.id} has no tokenizer that transformers can load ({error})"
        ) from None
    template = resolve_template(asked.template, tokenizer)
    filler, _ = choose_placeholder(tokenizer, len(tokenizer))
    projector = MlpConfig() if recipe is None else recipe.graft.projector
    positions = describe_tower(vision).positions(projector)
    return GraftProcessor(tokenizer, positions, filler, template)


def _with_template(processor: GraftProcessor, template: str) -> GraftProcessor:
    return processor.with_template(resolve_template(template, processor.tokenizer))


def _placed(entry: DataEntry, asked: Asked) -> DataEntry:
    if asked.images is None:
        return entry
    return entry.model_copy(update={"images": str(asked.images)})
