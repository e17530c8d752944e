"""Views of rows, from a file or a run: tokenizer, template, image positions, length."""

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path

from mmgraft.aliases import resolve_alias
from mmgraft.anatomy import skeleton
from mmgraft.anatomy.inspection import position_table
from mmgraft.basefiles import ModelFiles, find_tokenizer, load_config, resolve
from mmgraft.basefiles.files import vocabulary
from mmgraft.data.chat.placeholder import choose_placeholder
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.template import resolve_template
from mmgraft.data.formats.sources import is_there
from mmgraft.errors import UsageError, did_you_mean
from mmgraft.frozen import Frozen
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import base_files, load_processor, local_tower
from mmgraft.recipes.recipe import DataEntry, GraftDefaults, Recipe
from mmgraft.recipes.source import entry_of, find_recipe, load_recipe, template_options
from mmgraft.runs.find import is_graft
from mmgraft.training.plan import recipe_file
from mmgraft.training.stage_data import check_data_is_set, with_template
from mmgraft.vision.towers.registry import describe_tower


class Selection(Frozen):
    """Options that a user gave.

    Attributes:
        target: A file of rows, or the folder of a run.
        run: Reads a file as this run would.
        base: Reads it with this base's tokenizer instead; needs ``vision``.
        vision: The tower that says how many positions an image has.
        recipe: Instead of the run's.
        stage: Of the recipe; None takes all.
        images: Folder that image paths start from.
        template: Instead of the graft's and the stages'.
        template_option: ``KEY=VALUE`` of its variables, beside the graft's and the recipe's.
        max_length: Instead of the stages'.
        read: How the file is read, as ``entry_of`` takes it.
    """

    target: Path
    run: Path | None = None
    base: str | None = None
    vision: str | None = None
    recipe: str | None = None
    stage: str | None = None
    images: Path | None = None
    template: str | None = None
    template_option: Sequence[str] | None = None
    max_length: int | None = None
    read: Sequence[str] | None = None


class View(Frozen):
    """Rows, and what reads them in some stages.

    Attributes:
        entries: Files of rows.
        stages: That read them so; none for a file by itself.
        processor: None where no tokenizer is known.
        max_length: Where rows are cut.
        skip_text: Rows without an image are left out.
        positions: Of the base's position table; None where it has none, or is not known.
    """

    entries: tuple[DataEntry, ...]
    stages: tuple[str, ...] = ()
    processor: GraftProcessor | None = field(default=None, compare=False)
    max_length: int | None = None
    skip_text: bool = False
    positions: int | None = None


def views(chosen: Selection) -> list[View]:
    """Find how the rows that a user named are read: once for stages that read them alike.

    Raises:
        UsageError: Something that is not there, or options that do not go together.
    """
    run, file = _run_and_file(chosen)
    recipe, processor, positions = _of_names(chosen) if run is None else _of_run(chosen, run)
    given = [] if file is None else [entry_of(str(file), read=chosen.read)]
    if recipe is None:
        reads = processor and with_template(processor, chosen.template)
        entries = _placed(given, chosen)
        return [View(entries, (), reads, chosen.max_length, positions=positions)]
    found: dict[tuple[object, ...], View] = {}
    for stage in recipe.stages:
        if chosen.stage not in (None, stage.name):
            continue
        entries = _placed(given or stage.data or [], chosen)
        template = chosen.template or stage.template
        length = chosen.max_length or stage.max_length
        skips = stage.text_rows == "skip"
        key = (repr(entries), template, length, skips)
        stages = (*found[key].stages, stage.name) if key in found else (stage.name,)
        reads = processor and with_template(processor, template)
        found[key] = View(entries, stages, reads, length, skips, positions)
    if not found:
        names = [stage.name for stage in recipe.stages]
        raise UsageError(f"no stage {chosen.stage!r}; {did_you_mean(str(chosen.stage), names)}")
    return list(found.values())


def _run_and_file(chosen: Selection) -> tuple[Path | None, Path | None]:
    target, run, file = chosen.target, chosen.run, None
    if is_graft(target):
        if run is not None:
            raise UsageError(f"{target} is a run itself; give --run beside a file of rows")
        run = target
    elif is_there(str(target)):
        file = target
    elif target.is_dir():
        raise UsageError(
            f"{target} is neither a file of rows nor the folder of a graft or of shards; give "
            "one of them, or a pattern of files"
        )
    else:
        raise UsageError(
            f"no file and no run {target}; give a LLaVA json, a messages jsonl, or the folder "
            "of a graft"
        )
    if run is not None and (chosen.base or chosen.vision):
        raise UsageError(f"the run {run} names its base and tower; leave --base and --vision out")
    if chosen.stage is not None and run is None and chosen.recipe is None:
        raise UsageError("--stage is of a recipe; give --run or --recipe as well")
    return run, file


#: A recipe, the processor and the size of the base's position table, where they are known.
_Readers = tuple[Recipe | None, GraftProcessor | None, int | None]


def _of_run(chosen: Selection, run: Path) -> _Readers:
    """Load what reads the rows of a run; no weights are read."""
    record = GraftFile.read(run)
    path = recipe_file(run, record, chosen.recipe)
    recipe = load_recipe(path, method=record.method).resolved(record.workflow)
    base = base_files(record, run)
    options = {**recipe.template_options, **template_options(chosen.template_option)}
    processor = load_processor(record, base.path, describe_tower(local_tower(record, run)), options)
    if run == chosen.target:
        check_data_is_set(recipe, run, path)
    return recipe, processor, _positions(base)


def _of_names(chosen: Selection) -> _Readers:
    """Load what a recipe, a base and a tower make that are named, or that the recipe names."""
    recipe = None
    if chosen.recipe is not None:
        recipe = load_recipe(find_recipe(chosen.recipe)).resolved()
    graft = GraftDefaults() if recipe is None else recipe.graft
    name, vision = chosen.base or graft.base, chosen.vision or graft.vision
    if name is None:
        return recipe, None, None
    if vision is None:
        raise UsageError("--base without --vision; name the tower too, for an image's positions")
    base = resolve(resolve_alias(name))
    tokenizer = find_tokenizer(base.path)
    if tokenizer is None:
        raise UsageError(f"the base {base.id} has no tokenizer; put its files beside its weights")
    template = resolve_template(chosen.template, tokenizer)
    filler, _ = choose_placeholder(tokenizer, len(tokenizer))
    takes = recipe and get_method(recipe.method).positions
    positions = describe_tower(vision).positions(graft.projector, takes)
    options = template_options(chosen.template_option)
    options = {**(recipe.template_options if recipe else {}), **options}
    rows = vocabulary(base.path)
    processor = GraftProcessor(
        tokenizer, positions, filler, template, options=options, vocab_size=rows
    )
    return recipe, processor, _positions(base)


def _positions(base: ModelFiles) -> int | None:
    """Find the base's position table, if it has one; no weights are read."""
    try:
        config = load_config(base)
        return position_table(skeleton(config), config.get_text_config(decoder=True))
    except UsageError:
        return None  # no text model: its rows are read all the same, and no graft is made on it


def _placed(entries: list[DataEntry], chosen: Selection) -> tuple[DataEntry, ...]:
    """Return files of rows with the folder of images that a user named."""
    update = {} if chosen.images is None else {"images": str(chosen.images)}
    return tuple(entry.model_copy(update=update) for entry in entries)
