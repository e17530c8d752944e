"""A recipe: the stages, data and settings of one training run, read from YAML. Free of torch."""

from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Literal

import pydantic
from typing_extensions import Self

from mmgraft.aliases import default_tower
from mmgraft.data.formats.layouts import Column, Format, Vqa
from mmgraft.data.rows import HUB, OnBadRow
from mmgraft.errors import UsageError, did_you_mean
from mmgraft.grafts.method import StageSwitches
from mmgraft.grafts.registry import methods
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.strict import StrictModel, about
from mmgraft.vision.projectors.configs import MlpConfig
from mmgraft.vision.projectors.registry import AnyProjector
from mmgraft.vision.spec import VisionSpec

TextRows = Literal["skip", "graft", "base"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
Parallel = Literal["ddp", "fsdp2"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32)]
Beta = Annotated[float, pydantic.Field(ge=0, lt=1)]


def _refuse_fp16(value: Any) -> Any:
    if value in ("fp16", "float16", "half"):
        raise ValueError(
            "training in fp16 is refused: small gradients become zero and large ones inf; "
            "write bf16 or fp32"
        )
    return value


Precision = Annotated[Literal["bf16", "fp32"], pydantic.BeforeValidator(_refuse_fp16)]


def _workflow_name(name: str) -> str:
    if name == "text" or not name.isidentifier():
        raise ValueError(
            "a workflow is called by a word such as mm or grounding (text is the base alone)"
        )
    return name


WorkflowName = Annotated[str, pydantic.AfterValidator(_workflow_name)]


class DataEntry(StrictModel):
    """Rows that belong together: one file, or the shards of one set."""

    path: str | None = about(
        "json, jsonl, parquet, tar, a folder or pattern of them, or hub:OWNER/NAME; empty until set"
    )
    images: str | None = about("folder that image paths start from")
    format: Format = about("layout of the rows, where keys do not tell", "auto")
    columns: dict[Column, str] = about(
        "columns of a table of questions: {image: ..., question: ...}", dict
    )
    vqa: Vqa | None = about("template and answers of such a table")
    weight: float = about(
        "2 shows every row twice an epoch, 0.5 every other", 1.0, gt=0, le=100_000
    )
    limit: int | None = about("use the first rows only", ge=1)
    split: str = about("split of a set of the Hub, or of one that datasets saved", "train")
    subset: str | None = about("configuration of a set of the Hub")
    revision: str | None = about("branch, tag or commit of that set")

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if self.columns and self.format not in ("auto", "vqa"):
            raise ValueError(f"columns are of a table, and format is {self.format}; leave one out")
        if self.vqa is not None and not self.columns and self.format != "vqa":
            raise ValueError("vqa is of a table; write its columns as well, or format: vqa")
        if self.path is None or self.path.startswith(HUB):
            return self
        for name in ("subset", "revision"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} belongs to a set of the Hub, and {self.path} is none; write "
                    f"hub:OWNER/NAME as its path, or leave {name} out"
                )
        return self


class GraftDefaults(StrictModel):
    """Defaults of ``mmgraft graft`` for options that are not given."""

    base: str | None = about("alias, Hub id or folder")
    vision: str | None = about("Hub id, folder or registered tower")
    vision_options: dict[str, Any] = about(
        "settings of a registered tower, such as image_size", dict
    )
    feature_layer: int | None = about("hidden state of the tower; -2 is usual")
    config: dict[str, Any] = about("the method's own settings", dict)
    projector: AnyProjector = MlpConfig()

    def tower(self, named: str | None = None, layer: int | None = None) -> VisionSpec:
        """Return the tower: this one unless another is named, with a layer where one is given."""
        spec = VisionSpec.from_name(named or self.vision or default_tower())
        update: dict[str, Any] = {"feature_layer": self.feature_layer if layer is None else layer}
        if named is None and self.vision_options:
            update["options"] = dict(self.vision_options)
        return spec.model_copy(update={k: v for k, v in update.items() if v is not None})


class Stage(StageSwitches):
    """One run of the Trainer.

    Settings that are None take the recipe's value; see :meth:`Recipe.resolved`. What a stage of a
    method may switch beside them stands in :func:`stage_class`.
    """

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    train: list[str] = pydantic.Field(min_length=1, description="groups of parameters")
    lr: float | dict[str, float] = pydantic.Field(description="one number, or one for each group")
    data: list[DataEntry] | None = about("instead of the recipe's data")
    workflow: WorkflowName | None = None
    graft_active: bool = about("false leaves the graft out of the path", True)
    epochs: float | None = pydantic.Field(default=None, gt=0, le=100_000)
    max_steps: int | None = pydantic.Field(default=None, ge=1)
    batch_size: int = about("rows in one forward pass on one device", 1, ge=1)
    accumulate: int = about("forward passes in one step of the optimizer", 1, ge=1)
    optimizer: Optimizer = "adamw"
    weight_decay: float = pydantic.Field(default=0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = pydantic.Field(default=1e-8, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float | None = pydantic.Field(default=None, ge=0, lt=1)
    warmup_steps: int | None = pydantic.Field(default=None, ge=0)
    clip_norm: float = about("0 clips nothing", 1.0, ge=0)
    max_length: int | None = about("positions in a row, images counted", ge=8)
    gradient_checkpointing: bool = False
    packing: bool = about("several rows in a sequence of up to max_length positions", False)
    group_by: Literal["length", "modality"] | None = about(
        "rows of a batch alike in length, or all with or without an image"
    )
    template: str | None = about("chat, plain or a jinja file; None: the graft's own")
    text_rows: TextRows | None = None
    image_share: float | None = about("share of rows with an image among those shown", gt=0, lt=1)
    precision: Precision | None = None
    seed: Seed | None = None

    @pydantic.field_validator("lr")
    @classmethod
    def _positive(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        rates = value.values() if isinstance(value, dict) else [value]
        if not rates or any(rate <= 0 for rate in rates):
            raise ValueError(
                "a learning rate is above 0; leave a group out of `train` to freeze it"
            )
        return value

    @pydantic.model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if not self.graft_active and any(g not in ("projector", "base") for g in self.train):
            raise self.refusal(
                "graft_active: false leaves the graft out of the path, so it "
                "can train projector (and base) only"
            )
        try:
            self.check_switches(self.train)
        except ValueError as error:
            raise self.refusal(str(error)) from None
        if self.epochs is not None and self.max_steps is not None:
            raise self.refusal("give epochs or max_steps, not both")
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise self.refusal("give warmup_ratio or warmup_steps, not both")
        if self.packing and self.max_length is None:
            raise self.refusal("packing fills sequences of max_length positions; give max_length")
        if self.packing and self.group_by is not None:
            raise self.refusal("packing leaves nothing to group; give packing or group_by")
        if isinstance(self.lr, dict) and "default" not in self.lr:
            missing = [group for group in self.train if group not in self.lr]
            if missing:
                raise self.refusal(
                    f"lr names no rate for {', '.join(missing)}; add one, or `default`"
                )
        return self

    def refusal(self, text: str) -> ValueError:
        """Return the error of a setting that this stage cannot have."""
        return ValueError(f"stage {self.name!r}: {text}")

    @property
    def trains_base(self) -> bool:
        """Return whether base weights move in this stage."""
        return "base" in self.train


@cache
def stage_class(switches: type[StageSwitches]) -> type[Stage]:
    """Return the class of stages of a method that may switch this."""
    if switches is StageSwitches:
        return Stage
    if taken := set(switches.model_fields) & set(Stage.model_fields):
        raise UsageError(
            f"{switches.__module__}.{switches.__qualname__} switches {', '.join(sorted(taken))}, "
            "which every stage has a setting for; rename it in the package "
            f"{switches.__module__.partition('.')[0]!r}"
        )
    made: Any = pydantic.create_model(f"Stage_{switches.__name__}", __base__=(switches, Stage))
    return made


def _stage(value: Any, info: pydantic.ValidationInfo) -> Stage:
    """Read a stage as the recipe's method has them; other methods' keys may be there as null."""
    if isinstance(value, Stage):
        return value
    known = methods()
    method = known.get(info.data.get("method", ""))
    made = stage_class(method.stage if method else StageSwitches)
    if not isinstance(value, dict):
        return made.model_validate(value)
    given = dict(value)
    for key in set(given) - set(made.model_fields):
        owners = [name for name, one in known.items() if key in one.stage.model_fields]
        if owners and given.pop(key) is not None:
            raise ValueError(
                f"{key} belongs to method {' and '.join(owners)}, not {info.data.get('method')}"
            )
    return made.model_validate(given)


class Recipe(StrictModel):
    """A whole training run. Shipped ones: ``mmgraft recipes ls``."""

    name: str
    method: str
    description: str = ""
    graft: GraftDefaults = pydantic.Field(default_factory=lambda: GraftDefaults())
    workflow: WorkflowName | None = about("workflow that is trained; None: the graft's")
    base: Literal["frozen", "full"] = "frozen"
    quantization: Literal["nf4"] | None = about("4-bit weights of a frozen base")
    data: list[DataEntry] = pydantic.Field(default_factory=list)
    eval_data: list[DataEntry] = pydantic.Field(default_factory=list)
    stages: list[Annotated[pydantic.SerializeAsAny[Stage], pydantic.PlainValidator(_stage)]] = (
        pydantic.Field(min_length=1)
    )
    template_options: dict[str, Any] = about(
        "variables of the chat template, such as enable_thinking: false", dict
    )
    text_rows: TextRows | None = None
    image_share: float | None = about("share of rows with an image among those shown", gt=0, lt=1)
    precision: Precision = "bf16"
    seed: Seed = 0
    tracking: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    log_every: int = about("steps", 10, ge=1)
    save_every: int | None = about("steps; a stage's end always saves", 500, ge=1)
    keep_checkpoints: int = pydantic.Field(default=2, ge=1)
    eval_every: int | None = about("steps; needs eval_data", ge=1)
    evaluation: list[SetSpec] = about("sets that `mmgraft eval` asks", list)
    feature_cache: bool | str = about(
        "compute the tower once an image: true keeps it in the run, or a folder", False
    )
    attention: Attention | None = about(
        "kernel of the base's attention; None: the one transformers takes"
    )
    compile: bool = about("decoder layers through torch.compile", False)
    parallel: Parallel = about("way of sharing a training among --processes N", "ddp")
    workers: int | None = about(
        "processes that load rows and images; None: 4 on CUDA (no more than there are "
        "cores), else 0",
        ge=0,
    )
    on_bad_row: OnBadRow = about(
        "error names a row that cannot be used; skip leaves it out and logs it", "error"
    )

    @pydantic.field_validator("feature_cache")
    @classmethod
    def _named(cls, value: bool | str) -> bool | str:
        if value == "":
            raise ValueError("names no folder; write true, false or a folder")
        return value

    @pydantic.field_validator("parallel", "base", mode="before")
    @classmethod
    def _refuse_unbuilt(cls, value: Any) -> Any:
        if value in ("zero2", "zero3"):
            raise ValueError(f"{value} (DeepSpeed) is not built; write fsdp2, which shards as well")
        if isinstance(value, str) and value in methods():
            raise ValueError(
                f"{value} is a method of its own (mmgraft graft BASE --method {value}), not a way "
                "to train the base; write frozen or full"
            )
        return value

    @pydantic.model_validator(mode="after")
    def _whole(self) -> Self:
        self._check_base()
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are called {twice[0]!r}; give each its own name")
        if self.eval_every is not None and not self.eval_data:
            raise ValueError("eval_every is set, but eval_data is empty; add rows to evaluate on")
        self._check_parallel()
        for stage in self.stages:
            self._check_groups(stage)
            self._check_text_rows(stage)
            self._check_batches(stage)
        return self

    def _check_base(self) -> None:
        if self.base == "full" and self.quantization is not None:
            raise ValueError(
                f"quantization: {self.quantization} needs a frozen base, but base: full trains it; "
                "remove one of the two"
            )
        if self.compile and self.quantization is not None:
            raise ValueError(
                f"compile: true and quantization: {self.quantization} together are not built; "
                "remove one of the two"
            )
        trains = [stage.name for stage in self.stages if stage.trains_base]
        if trains and self.base != "full":
            raise ValueError(
                f"stage {trains[0]!r} trains the base, but the recipe says base: {self.base}; "
                "write base: full, or take base out of the stage's train"
            )
        if self.base == "full" and not trains:
            raise ValueError(
                "base: full, but no stage trains it; add base to a stage's train, or write "
                "base: frozen"
            )

    def _check_parallel(self) -> None:
        if self.parallel == "ddp":
            return
        if self.compile:
            raise ValueError(
                f"compile: true and parallel: {self.parallel} together are not built; write "
                "parallel: ddp, or leave compile out"
            )
        for stage in self.stages:
            if stage.optimizer != "adamw":
                raise stage.refusal(
                    f"optimizer: {stage.optimizer} keeps whole states, and "
                    f"parallel: {self.parallel} spreads them over the processes; write adamw, or "
                    "parallel: ddp"
                )

    def _check_groups(self, stage: Stage) -> None:
        method = methods().get(self.method)
        if method is None or method.groups is None:
            return  # the model checks them
        known = ("projector", *(("graft",) if method.groups else ()), *method.groups, "base")
        rated, rates = (*known, "default"), stage.lr if isinstance(stage.lr, dict) else ()
        trains = [(group, "trains", known) for group in stage.train]
        for group, does, names in (
            *trains,
            *((one, "has a learning rate for", rated) for one in rates),
        ):
            if group not in names:
                raise ValueError(
                    f"stage {stage.name!r} {does} {group!r}, which {self.method} does not have; "
                    + did_you_mean(group, names)
                )

    def _check_text_rows(self, stage: Stage) -> None:
        wanted = stage.text_rows or self.text_rows
        if stage.text_rows == "base" and not stage.trains_base:
            raise stage.refusal(
                "text_rows: base sends rows without an image through the "
                "base alone, which this stage does not train; write skip or graft"
            )
        if wanted == "base" and self.base != "full":
            raise ValueError("text_rows: base needs base: full; write skip or graft")

    def _check_batches(self, stage: Stage) -> None:
        share = stage.image_share or self.image_share
        if share is not None and self._text_rows_of(stage) == "skip":
            raise stage.refusal(
                f"image_share: {share:g} mixes rows without an image in, and "
                "text_rows: skip leaves them out; write text_rows: graft, or leave image_share out"
            )
        if stage.group_by == "modality" and self._text_rows_of(stage) == "skip":
            raise stage.refusal(
                "group_by: modality tells rows with an image from those without, and text_rows: "
                "skip leaves the latter out; write group_by: length, or text_rows: graft"
            )
        flash = self.attention is not None and self.attention.startswith("flash")
        if flash and (stage.precision or self.precision) == "fp32":
            raise stage.refusal(
                f"{self.attention} computes in bf16; write precision: bf16, or attention: sdpa"
            )
        if stage.packing and flash and stage.batch_size > 1:
            raise stage.refusal(
                f"{self.attention} keeps packed rows apart in one sequence "
                "only; write batch_size: 1 and a larger max_length or accumulate"
            )

    def resolved(self, workflow: str = "mm") -> "Recipe":
        """Return the recipe with its settings written into the stages that name none of their own.

        Args:
            workflow: The graft's own, for stages that name none.
        """
        stages = []
        for stage in self.stages:
            epochs = 1.0 if stage.epochs is None and stage.max_steps is None else stage.epochs
            settings = {
                "data": stage.data if stage.data is not None else self.data,
                "workflow": stage.workflow or self.workflow or workflow,
                "text_rows": self._text_rows_of(stage),
                "image_share": stage.image_share or self.image_share,
                "precision": stage.precision or self.precision,
                "seed": self.seed if stage.seed is None else stage.seed,
                "epochs": epochs,
            }
            stages.append(stage.model_copy(update=settings))
        return self.model_copy(update={"stages": stages})

    def _text_rows_of(self, stage: Stage) -> TextRows:
        rows = stage.text_rows or self.text_rows
        if rows is None or (rows == "base" and not stage.trains_base):
            return "base" if stage.trains_base else "skip"
        return rows

    def data_to_set(self) -> Sequence[str]:
        """Keys of data that is still empty, as a user writes them: ``stages[0].data[0].path``."""
        keys: list[str] = []
        for index, stage in enumerate(self.stages):
            where = f"stages[{index}].data" if stage.data is not None else "data"
            entries = stage.data if stage.data is not None else self.data
            if not entries:
                keys.append(f"{where}[0].path")
            keys += [f"{where}[{i}].path" for i, entry in enumerate(entries) if not entry.path]
        return list(dict.fromkeys(keys))
