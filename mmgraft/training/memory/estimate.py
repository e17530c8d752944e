"""The memory of every stage of a recipe, which part takes what, and the rows that decide it.

The graft is the one that configs describe: a run's, or one of a recipe. The optimizer, and the
share of a process where several train together, are counted by what each way does, worked out by
hand in the tests; none was compared with a measured peak.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from mmgraft.aliases import resolve_alias
from mmgraft.anatomy import decoder_layers
from mmgraft.basefiles import ModelFiles, load_config
from mmgraft.data.batches.dataset import cut, longest_first
from mmgraft.data.chat.labels import supervise_row
from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.formats.indexed import facts_of, select
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.graft_file import OWN_BASE, BaseReference, GraftFile, ImageToken
from mmgraft.model.files.load import local_tower
from mmgraft.model.files.summary import locate
from mmgraft.model.modeling import GraftedModel
from mmgraft.recipes.recipe import Optimizer, Parallel, Recipe
from mmgraft.training.distributed.sharding import pieces_at
from mmgraft.training.memory import simulation
from mmgraft.training.stages import open_stage
from mmgraft.vision.plan import ImagePositions, Plan, Size
from mmgraft.vision.spec import TRANSFORMERS_KIND, VisionSpec
from mmgraft.vision.towers.base import VisionTower
from mmgraft.vision.towers.registry import TowerShape, describe_tower, load_tower


class Subject(Frozen):
    """A graft, its base and its tower, without weights.

    Attributes:
        record: The graft's.
        files: The base's, of which config and tokenizer are read.
        config: The base's.
        vision: The tower's spec, its path that of this machine.
        shape: The tower's width and plan.
    """

    record: GraftFile
    files: ModelFiles
    config: PreTrainedConfig
    vision: VisionSpec
    shape: TowerShape

    @property
    def positions(self) -> ImagePositions:
        """Positions of an image."""
        return self.record.positions(self.shape)

    def plan(self, size: Size | None) -> Plan:
        """Return the plan of an image of a size; of every image where the size is None."""
        plan = self.shape.plan
        if isinstance(plan, Plan):
            return plan
        assert size is not None
        return plan(size)

    @cached_property
    def tower(self) -> VisionTower:
        """Build the tower without weights; one of a registered kind has no config and is loaded."""
        if self.vision.kind != TRANSFORMERS_KIND:
            return load_tower(self.vision)
        from mmgraft.vision.towers.transformers import outline

        return outline(self.vision)


def subject_of_run(run: Path, base: str | None = None, vision: str | None = None) -> Subject:
    """Describe the graft in a folder, on its own base and tower or on others.

    Raises:
        UsageError: No graft there, or no such base or tower.
    """
    record = GraftFile.read(run)
    if base is None and record.base.id.startswith(f"./{OWN_BASE}"):
        files = ModelFiles(record.base.id, (run / record.base.id).resolve())
    else:
        revision = record.base.revision if base is None else None
        files = _base(resolve_alias(base) if base else record.base.id, revision)
    spec = VisionSpec.from_name(vision) if vision else local_tower(record, run)
    return _subject(record, files, spec)


def subject_of_recipe(
    recipe: Recipe, base: str | None = None, vision: str | None = None
) -> Subject:
    """Describe the graft that ``mmgraft graft --recipe`` would make.

    Raises:
        UsageError: The recipe names no base and none is given, or settings that do not fit.
    """
    name = base or recipe.graft.base
    if name is None:
        raise UsageError(
            f"the recipe {recipe.name} names no base: give --base, such as --base qwen2-7b"
        )
    spec = recipe.graft.tower(vision)
    record = GraftFile(
        method=recipe.method,
        config=_method_config(recipe),
        workflow=recipe.workflow or "mm",
        base=BaseReference(id=name),
        vision=spec,
        projector=recipe.graft.projector,
        image_token=ImageToken(id=0),
    )
    return _subject(record, _base(resolve_alias(name), None), spec)


def _method_config(recipe: Recipe) -> dict[str, Any]:
    kind = get_method(recipe.method).config_class
    try:
        return kind.parse(dict(recipe.graft.config), "graft.config").model_dump(mode="json")
    except UsageError as error:
        raise UsageError(
            f"{error}; set it in the recipe, or here with --set graft.config.KEY=VALUE, such as "
            "--set graft.config.layers=last:2"
        ) from None


def _base(name: str, revision: str | None) -> ModelFiles:
    folder = Path(name).expanduser().absolute()
    if (folder / "config.json").is_file() and not (folder / "graft_config.json").is_file():
        return ModelFiles(str(folder), folder)  # with weights or without
    found = locate(name, revision)
    if isinstance(found, Path):
        raise UsageError(f"{name} is a graft, not a base; name a model with --base")
    return found


def _subject(record: GraftFile, files: ModelFiles, spec: VisionSpec) -> Subject:
    shape = describe_tower(spec)
    config = load_config(files)
    vars(config).pop("quantization_config", None)
    return Subject(record, files, config, spec, shape)


def loaded_dtype(recipe: Recipe) -> torch.dtype:
    """Return the base's dtype in training: fp32 where it is trained or computed in fp32."""
    whole = recipe.base == "full" or any(stage.precision == "fp32" for stage in recipe.stages)
    return torch.float32 if whole else torch.bfloat16


_WHOLE = 4096  # bitsandbytes keeps the state of smaller tensors in 32 bits
_PAGED = 100_000  # and pages only that of larger ones
_BLOCK = 256  # moments that share an fp32 constant


class Groups(Frozen):
    """Tensors that FSDP2 gathers together.

    Attributes:
        layer: Bytes of the largest decoder layer with what grafts run there.
        rest: Bytes of all that is in no layer: embeddings, norm, head, projector.
        trained: Trained numbers in the group that has most of them.
    """

    layer: int
    rest: int
    trained: int


class Share(Frozen, kw_only=True):
    """Bytes of one process.

    Attributes:
        weights: Of base, graft and projector that it keeps all the time, by dtype; ``nf4`` with its
            constants.
        gradients: That it keeps of what is trained, in fp32.
        optimizer: Its state.
        scratch: Of the optimizer's step.
        gathered: Weights of other processes that are whole here while they are computed with.
        passing: Gradients that are whole on their way to the others.
    """

    weights: dict[str, int]
    gradients: int
    optimizer: int
    scratch: int
    gathered: int = 0
    passing: int = 0


def groups_of(model: GraftedModel) -> Groups:
    """Divide a model as FSDP2 does in :mod:`mmgraft.training.distributed.sharding`."""
    whole = sum(simulation.weights_of(model).values())
    sizes: list[int] = []
    trained: list[int] = []
    for index, layer in enumerate(decoder_layers(model.base, model.anatomy)):
        parts = [layer, *pieces_at(model, index)]
        sizes.append(sum(sum(simulation.weights_of(part).values()) for part in parts))
        trained.append(
            sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)
        )
    every = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Groups(max(sizes), whole - sum(sizes), max(*trained, every - sum(trained)))


def whole_share(model: GraftedModel, optimizer: Optimizer, device: str) -> Share:
    """Count what a process holds of a model that it trains alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return Share(
        weights=simulation.weights_of(model),
        gradients=sum(4 * p.numel() for p in trained),
        optimizer=state_bytes(model, trained, optimizer, device),
        scratch=scratch_bytes(trained, optimizer, device),
    )


def share(whole: Share, groups: Groups, way: Parallel, processes: int) -> Share:
    """Count what one process holds of a model.

    Args:
        whole: What it would hold alone.
        groups: What is gathered together.
        way: The recipe's ``parallel``.
        processes: How many share it; one holds everything.
    """
    if processes == 1 or way == "ddp":
        return whole

    def part(size: int) -> int:
        return -(-size // processes)

    # The rest stays whole from its forward to its backward; one layer runs, one is on its way.
    # Gradients of two groups: one is computed, one is being summed over all processes.
    return Share(
        weights={name: part(size) for name, size in whole.weights.items()},
        gradients=part(whole.gradients),
        optimizer=part(whole.optimizer),
        scratch=part(whole.scratch),
        gathered=min(groups.rest + 2 * groups.layer, sum(whole.weights.values())),
        passing=min(2 * 4 * groups.trained, whole.gradients),
    )


def state_bytes(
    model: nn.Module, trained: Iterable[nn.Parameter], optimizer: Optimizer, device: str
) -> int:
    """Count the bytes of both moments on the device where the parameters are.

    AdamW keeps two fp32 numbers for each; in 8 bits one byte each and a constant for 256, where
    embeddings and tensors under 4096 numbers keep fp32. Pages on CUDA lie in main memory.
    """
    if optimizer == "adamw":
        return sum(8 * parameter.numel() for parameter in trained)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    paged = optimizer == "paged_adamw_8bit" and device == "cuda"
    total = 0
    for parameter in trained:
        size = parameter.numel()
        if paged and size >= _PAGED:
            continue
        whole = id(parameter) in tables or size < _WHOLE
        total += 8 * size if whole else 2 * size + 2 * 4 * -(-size // _BLOCK)
    return total


def scratch_bytes(trained: Iterable[nn.Parameter], optimizer: Optimizer, device: str) -> int:
    """Count what a step holds beside the state: two copies of a parameter's second moments.

    On CUDA one kernel does all of the step, and holds nothing.
    """
    if optimizer != "adamw" or device == "cuda":
        return 0
    return 2 * max((4 * parameter.numel() for parameter in trained), default=0)


#: Rows of a stage that are tokenised: those with the most text and image positions.
TOKENISED = 64


class RowSizes(Frozen):
    """The largest row of a stage.

    Attributes:
        length: Positions, images counted.
        images: Images in the row that has the most.
        supervised: Supervised tokens in it.
        uneven: Rows differ in length.
        source: Where the numbers come from, in words.
        sizes: Of the images of that row, where their positions depend on them.
    """

    length: int
    images: int
    supervised: int
    uneven: bool
    source: str
    sizes: tuple[Size, ...] = ()


def measured(
    rows: Sequence[Row],
    processor: GraftProcessor,
    max_length: int | None,
    text_rows: str | None,
    packing: bool = False,
    skip_bad: bool = False,
) -> RowSizes:
    """Measure a stage's rows by tokenising the longest ones; with packing, its sequences.

    Args:
        rows: Of the stage.
        processor: For ids.
        max_length: Where rows are cut.
        text_rows: ``skip`` leaves rows without an image out.
        packing: Several rows stand in one sequence.
        skip_bad: Leave out rows that cannot be used.

    Raises:
        UsageError: A row that cannot be used; with ``skip_bad``, where none of the longest can.
    """
    kept = select(rows, facts_of(rows).with_image) if text_rows == "skip" else rows
    longest = [kept[int(at)] for at in longest_first(kept, processor)[:TOKENISED]]
    encoded = _usable(longest, processor, max_length, skip_bad)
    lengths = [len(one) for one in encoded]
    images = [len(one.images) for one in encoded]
    supervised = [sum(label != -100 for label in one.labels) for one in encoded]
    most = max(encoded, key=lambda one: sum(one.kinds))  # the row with the most image positions
    if packing and max_length is not None:
        # A sequence full of the rows that hold the most images and answers for their length.
        shown, labels = (
            max(max_length * n // length for n, length in zip(counts, lengths, strict=True))
            for counts in (images, supervised)
        )
        sizes, source = most.sizes * (max_length // len(most)), f"packed, from {len(kept)} rows"
        return RowSizes(max_length, shown, labels, True, source, sizes)
    uneven = len(kept) > len(longest) or len(set(lengths)) > 1
    source = f"longest of {len(kept)} rows"
    shown = len(most.sizes) or max(images)
    return RowSizes(max(lengths), shown, max(supervised), uneven, source, most.sizes)


def _usable(
    rows: Sequence[Row], processor: GraftProcessor, max_length: int | None, skip_bad: bool
) -> list[Encoded]:
    """Encode rows as training does, without those that cannot be used where it skips them."""
    found: list[Encoded] = []
    for at, row in enumerate(rows):
        try:
            encoded = supervise_row(processor, row)
            if max_length is not None and len(encoded) > max_length:
                encoded = cut(encoded, max_length, row.where)
            found.append(encoded)
        except UsageError:
            if not skip_bad or (not found and at + 1 == len(rows)):
                raise
    return found


def assumed(length: int, each: int | None, source: str, packing: bool = False) -> RowSizes:
    """Assume rows of one length with one image, all the rest of it supervised.

    A packed sequence is one of many rows: as many images as it has room for, each with an answer.

    Raises:
        UsageError: An image does not fit into the row, or its size decides how much it takes.
    """
    if each is None:
        raise UsageError(
            "with this tower the size of an image decides how many positions it takes; give --data "
            "FILE"
        )
    if length <= each + 1:
        raise UsageError(
            f"a row of {length} positions has no room for an image, which takes {each} with "
            f"this tower, and an answer; give --length {each + 64} or more"
        )
    images = length // (each + 2) if packing else 1
    return RowSizes(length, max(1, images), length - each - 1, True, source)


#: Bytes that a process takes beside its tensors once it trains: code that is read as it is used.
PROCESS = {"cuda": 0, "cpu": 100_000_000}
#: Bytes of the machine for each byte that comes and goes in a step.
#:
#: glibc gives no block back that lies between others that live, and what is kept lies between what
#: comes and goes. Both numbers are measured, see benchmarks/estimate_memory.py; on CUDA they are in
#: the reserve of every card.
ALLOCATOR = {"cuda": 1.0, "cpu": 1.6}
#: Images that the tower sees at a time while the feature cache is filled.
CACHED_AT_ONCE = 32


class StageEstimate(Share, kw_only=True):
    """Bytes that a stage takes, of one process where several share a training.

    Attributes:
        stage: Its name.
        rows: The largest row, and how many are in a batch.
        parameters: Numbers in base, graft and projector.
        trained: Of these, how many the stage trains.
        activations: Kept by the forward pass for the backward one.
        layers: Of these, what each decoder layer keeps, with what the graft adds to it.
        working: What the busiest moment of forward and backward holds beside weights, optimizer
            and, where they add up over several passes, gradients.
        tower: Weights of the vision tower.
        seeing: What the tower holds beside them while it runs.
        peak: The most at any moment, on the device.
        moment: When that is.
    """

    stage: str
    rows: RowSizes
    batch_size: int
    parameters: int
    trained: int
    activations: int
    layers: list[int]
    working: int
    tower: int
    seeing: int
    peak: int
    moment: str


@dataclass
class Estimator:
    """Estimates a recipe and its variations; equal parts of them are simulated once.

    Attributes:
        recipe: Resolved.
        subject: What is trained.
        rows: The largest row of each stage.
        device: ``cuda`` or ``cpu``: optimizers hold different things there.
        processes: How many train together, in the way of the recipe's ``parallel``.
    """

    recipe: Recipe
    subject: Subject
    rows: list[RowSizes]
    device: str = "cuda"
    processes: int = 1
    _opened: dict[Any, tuple[GraftedModel, simulation.Step]] = field(
        default_factory=dict, init=False
    )
    _towers: dict[Any, tuple[int, int]] = field(default_factory=dict, init=False)

    def stages(self, changed: Recipe | None = None, first: int = 0) -> list[StageEstimate]:
        """Estimate every stage from ``first`` on, of the recipe or of a variation of it.

        Raises:
            MMGraftError: A base that does not run without values.
        """
        recipe = changed or self.recipe
        return [self._stage(recipe, index) for index in range(first, len(recipe.stages))]

    def _stage(self, recipe: Recipe, index: int) -> StageEstimate:
        stage, rows = recipe.stages[index], self.rows[index]
        model, step = self._open(recipe, index)
        whole = whole_share(model, stage.optimizer, self.device)
        held = share(whole, groups_of(model), recipe.parallel, self.processes)
        images = CACHED_AT_ONCE if recipe.feature_cache else stage.batch_size * rows.images
        tower, seeing = self._tower(loaded_dtype(recipe), rows, images)
        process = tower + PROCESS[self.device]
        still = sum(held.weights.values()) + process
        # Several processes keep gradients elsewhere than the pass; those of DDP always lie there.
        many = self.processes > 1
        in_pieces = many and recipe.parallel != "ddp"
        stay = stage.accumulate > 1 or (many and not in_pieces)
        state, sums = held.optimizer, held.gradients if stay else 0
        working = step.peak - sums + (held.passing + held.gradients if many else 0)
        moving = int(working * ALLOCATOR[self.device])
        moments = {
            "forward and backward": still + held.gathered + state + sums + moving,
            "the optimizer's step": still + state + held.gradients + held.scratch,
            "the vision tower": still + seeing + (0 if recipe.feature_cache else state + sums),
        }
        if recipe.quantization and in_pieces:
            moments["loading"] = sum(whole.weights.values()) + process
        moment = max(moments, key=lambda name: moments[name])
        return StageEstimate(
            **vars(held),
            stage=stage.name,
            rows=rows,
            batch_size=stage.batch_size,
            parameters=simulation.count_of(model),
            trained=whole.gradients // 4,
            activations=step.kept - (0 if many else sums),
            layers=step.layers,
            working=working,
            tower=tower,
            seeing=seeing,
            peak=moments[moment],
            moment=moment,
        )

    def _open(self, recipe: Recipe, index: int) -> tuple[GraftedModel, simulation.Step]:
        """Open a stage's model and simulate its step; what the optimizer is does not matter."""
        stage, rows, subject = recipe.stages[index], self.rows[index], self.subject
        dtype, many = loaded_dtype(recipe), self.processes > 1
        load = simulation.Load(
            rows=stage.batch_size,
            length=rows.length,
            plans=tuple(map(subject.plan, rows.sizes or [None] * rows.images)),
            supervised=rows.supervised,
            padded=stage.packing or (rows.uneven and stage.batch_size > 1),
            width=subject.shape.hidden_size,
            dtype=dtype,
            precision=stage.precision or "bf16",
            device=self.device,
            checkpointing=stage.gradient_checkpointing,
            accumulates=stage.accumulate > 1 and not many,
            gradients_leave=many,
        )
        key = index, load, tuple(stage.train), recipe.quantization, recipe.attention
        if key not in self._opened:
            record = subject.record.model_copy(update={"workflow": stage.workflow})
            loaded = load.width, dtype, recipe.quantization, recipe.attention
            model = simulation.meta_model(record, subject.config, *loaded)
            open_stage(model, stage)
            model.train()
            self._opened[key] = model, simulation.simulate(model, load)
        return self._opened[key]

    def _tower(self, dtype: torch.dtype, rows: RowSizes, images: int) -> tuple[int, int]:
        """Return the bytes of the tower's weights, and what it holds beside them while it runs."""
        largest = max(rows.sizes, key=lambda size: self.subject.plan(size).entries, default=None)
        key = images, largest, dtype
        if key not in self._towers:
            tower = self.subject.tower
            plans = [self.subject.plan(largest) for _ in range(images)]
            seeing = simulation.simulate_tower(tower, largest, plans, dtype) if images else 0
            self._towers[key] = simulation.count_of(tower) * dtype.itemsize, seeing
        return self._towers[key]


def not_counted(recipe: Recipe, device: str, processes: int) -> list[str]:
    """Write a sentence for each setting of a recipe that an estimate knows little of.

    Args:
        recipe: Resolved.
        device: ``cuda`` or ``cpu``.
        processes: How many train together.
    """
    found: list[str] = []
    if recipe.compile:
        found.append("compile: counted as without it; torch.compile holds kernels and keeps less")
    if recipe.attention is not None and recipe.attention.startswith("flash"):
        found.append(f"attention: {recipe.attention} is counted as sdpa")
    if device == "cpu" and any(stage.precision != "fp32" for stage in recipe.stages):
        found.append("kernels: code that oneDNN makes for products in bf16, 0.6 GB at most")
    if device == "cpu" and recipe.workers:
        found.append(f"workers: the memory of the {recipe.workers} that load rows")
    if recipe.parallel != "ddp" and processes == 1:
        found.append(f"parallel: {recipe.parallel}: one process shares nothing; give --processes N")
    if processes > 1:
        found.append(
            f"parallel: {recipe.parallel}: its parts are counted by what it does, and were never "
            "compared with a measured peak"
        )
    return found
