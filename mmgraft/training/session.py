"""One session of a training: the model in memory, and what a stage needs around the Trainer."""

import gc
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import TrainerCallback

from mmgraft.data.batches.collate import Collator, PackCollator, examples_of
from mmgraft.data.batches.dataset import RowDataset
from mmgraft.data.batches.sampler import EvenDataset, EvenSampler
from mmgraft.data.features import fill_cache, open_cache
from mmgraft.data.formats.indexed import Joined, key_at, select
from mmgraft.data.rows import BadRow, BadRowLog, Row
from mmgraft.errors import UsageError
from mmgraft.grafts.base import MASK_WIDTH
from mmgraft.model.files.graft_file import CONFIG_NAME
from mmgraft.model.files.load import base_files
from mmgraft.model.files.save import save_graft
from mmgraft.model.kernels.compiling import check_compiled, compiled_layers
from mmgraft.model.modeling import GraftedModel
from mmgraft.recipes.recipe import Stage
from mmgraft.training import checkpoint, devices, row_order, stage_data, stages
from mmgraft.training.callbacks import metrics, text_change
from mmgraft.training.callbacks.stopping import NotFinite, Stopper, TrainingStopped, is_finite
from mmgraft.training.distributed.parallel import of_all_ranks, processes, way_on
from mmgraft.training.distributed.sharding import shard
from mmgraft.training.memory.estimate import loaded_dtype
from mmgraft.training.plan import Plan
from mmgraft.training.trainer import GraftTrainer, describe, training_arguments
from mmgraft.vision.feature_cache import FeatureCache, TowerFeatures

#: Folder of a run for the workflows beside its own.
WORKFLOWS = "workflows"


class Session:
    """Runs stages one by one on a model that it loads when the first one begins.

    Args:
        plan: The checked training.
        announce: Is called with a sentence when something happens.
    """

    def __init__(self, plan: Plan, announce: Callable[[str], None]) -> None:
        self.plan = plan
        self.announce = announce if devices.is_main_rank() else lambda text: None
        self.stopper = Stopper()
        self.model: Any = None  # a GraftedModel, once it is loaded
        self.processor: Any = None  # its GraftProcessor
        self._features: FeatureCache | None = None
        self.bad_rows = BadRowLog(plan.run, not plan.resume, self.announce)

    def stopped(self, where: str) -> TrainingStopped:
        """Make the error that says how to go on."""
        return TrainingStopped(
            f"stopped {where}; all is saved. Go on with: {way_on(self.plan.run)}"
        )

    def load(self) -> None:
        """Load the model for the first stage that is left, and check the rows of all that are.

        Nothing is written.

        Raises:
            UsageError: A base that is not the graft's, a graft that is damaged, a setting that this
                base cannot follow, or, where the recipe does not skip such rows, one that its
                template or its length spoils.
        """
        plan = self.plan
        model = self._model_for(plan.stages[plan.first])
        if plan.recipe.compile:
            check_compiled(model.base, model.anatomy, [model.workflow().graft])
        for stage in plan.stages[plan.first :]:
            row_order.check_packed_length(stage, model.anatomy.position_table)
        if plan.recipe.on_bad_row == "error":
            for index, stage in enumerate(plan.stages[plan.first :], start=plan.first):
                for rows in filter(None, (plan.rows[index], plan.eval_rows)):
                    self._dataset(rows, stage, False).check()

    def run_stage(
        self, index: int, callbacks: Sequence[TrainerCallback]
    ) -> tuple[int, float | None, int]:
        """Train a stage, save its graft, return steps taken, last loss and trained parameters.

        Raises:
            TrainingStopped: Ctrl-C before the stage's last step.
        """
        plan, stage = self.plan, self.plan.stages[index]
        model = self._model_for(stage)
        folder = checkpoint.stage_folder(plan.run, index, stage.name)
        if devices.is_main_rank():
            checkpoint.sweep(folder)
        last = self._last_checkpoint(index, folder)
        groups = stages.open_stage(model, stage)
        model.gradient_checkpointing = stage.gradient_checkpointing
        size = sum(group.size for group in groups)
        log = metrics.MetricsFile(plan.run, stage.name)
        with metrics.tracking_folder(plan.run / "tracking" / folder.name):
            trainer = self._trainer(index, folder, groups, [log, self.stopper, *callbacks])
        if last is not None and _is_final(last):
            checkpoint.load_tensors(model, last)
            taken, steps = 0, checkpoint.step_of(last)
        else:
            taken, steps = self._train(trainer, stage, last)
            self._remark(trainer, stage)
            tensors = checkpoint.trained_tensors(model, devices.is_main_rank())
            if devices.is_main_rank():
                checkpoint.write_final(tensors, folder, trainer.state)
        self._save(index, model, size, steps)
        trainer.accelerator.wait_for_everyone()
        if plan.in_pieces:
            self.model = None  # the next stage trains other parts, and has other pieces
        return taken, log.last.get("loss"), size

    def measure_text(self) -> None:
        """Say, and record, how far text has moved."""
        self._model_for(self.plan.stages[-1])
        self.announce(str(text_change.measure(self.plan.run, self.model, self.processor)))

    # -- parts of a stage -----------------------------------------------------------------------

    def _train(self, trainer: GraftTrainer, stage: Stage, last: Path | None) -> tuple[int, int]:
        """Train from a checkpoint on; return the steps taken now and those taken in all."""
        before = 0 if last is None else checkpoint.step_of(last)
        compiled: AbstractContextManager[None] = nullcontext()
        if self.plan.recipe.compile:
            model = self.model
            compiled = compiled_layers(model.base, model.anatomy, [model.workflow().graft])
        try:
            with self.stopper, compiled:
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except KeyboardInterrupt:
            raise TrainingStopped(
                f"stopped at once in stage {stage.name!r}; what was saved before is whole. "
                f"Go on with: {way_on(self.plan.run)}"
            ) from None
        except UsageError as error:  # a row that cannot be used, found when its turn came
            raise UsageError(_of_worker(error) + self._kept(trainer, stage, before)) from None
        except NotFinite as error:  # on all ranks at once
            raise NotFinite(str(error) + self._kept_finite(trainer, stage)) from None
        done, wanted = trainer.state.global_step, trainer.state.max_steps
        if done < wanted:
            raise self.stopped(f"in stage {stage.name!r} after step {done} of {wanted}")
        return done - before, done

    def _remark(self, trainer: GraftTrainer, stage: Stage) -> None:
        """Say, behind the last stage, what the graft has to say of how its training left it."""
        graft = self.model.workflow(stage.workflow).graft
        remark = graft.remark(trainer.readings) if stage is self.plan.stages[-1] else None
        if remark is not None:
            self.announce(remark)

    def _kept(self, trainer: GraftTrainer, stage: Stage, before: int) -> str:
        """Save the steps that were taken before a row failed, and say how to go on."""
        step = trainer.state.global_step
        if step <= before or trainer.args.world_size > 1:
            return ""
        trainer.save_now()
        return (
            f"\nstage {stage.name!r} is saved after step {step}; mend this, then go on with: "
            f"{way_on(self.plan.run)}"
        )

    def _kept_finite(self, trainer: GraftTrainer, stage: Stage) -> str:
        """Save the steps before the one that failed, and say how to go on."""
        step, way = trainer.state.global_step, way_on(self.plan.run)
        again = f"or begin anew with --restart and a lower lr: --set stages.{stage.name}.lr=NUMBER"
        if not is_finite(self.model):
            return (
                f"\nweights of stage {stage.name!r} are not finite either, so they are not saved; "
                f"go on from the last checkpoint with: {way}\n{again}"
            )
        folder = Path(cast(str, trainer.args.output_dir))
        if step and not (folder / f"checkpoint-{step}").is_dir():
            trainer.save_now()
        state = f"is saved after step {step}" if step else "is as it was before its first step"
        return (
            f"\nstage {stage.name!r} {state}; look at these rows, mend what is odd, and go on, "
            f"from that batch, with: {way}\n{again}"
        )

    def _trainer(
        self, index: int, folder: Path, groups: Any, callbacks: Sequence[TrainerCallback]
    ) -> GraftTrainer:
        plan, stage = self.plan, self.plan.stages[index]
        name = f"{plan.run.resolve().name}-{stage.name}"
        arguments = training_arguments(plan.recipe, stage, folder, plan.device, name)
        ranks = arguments.world_size  # from here on the processes know each other
        rows, evaluated, collator = self._inputs(index)
        kept = plan.resume and index == plan.first
        arranged = row_order.arrange(rows, stage, folder, ranks, plan.recipe.workers or 0, kept)
        self.bad_rows.put(arranged.bad, stage.name, 0)
        if arranged.says is not None:
            self.announce(arranged.says)
        if ranks > 1:
            together = stage.batch_size * ranks
            arranged.dataset = EvenDataset(arranged.dataset)
            evaluated = evaluated and EvenDataset(evaluated, together)
            arranged.sampler = EvenSampler(arranged.sampler, together)
        if plan.in_pieces:
            shard(self.model, plan.device)
            groups = stages.rate_groups(self.model, stage)
        return GraftTrainer(
            self.model,
            arguments,
            stage,
            groups,
            arranged.sampler,
            train_dataset=arranged.dataset,
            eval_dataset=evaluated,
            data_collator=_Batches(collator),
            keep=plan.recipe.keep_checkpoints,
            callbacks=callbacks,
            on_bad=lambda bad, step: self.bad_rows.put(bad, stage.name, step),
        )

    def _inputs(self, index: int) -> tuple[RowDataset, Any, Collator | PackCollator]:
        """Build the rows of a stage, those it is evaluated on, and the collator of both."""
        plan, stage = self.plan, self.plan.stages[index]
        features = self._cached_features(Joined([plan.rows[index], plan.eval_rows]), stage)
        rows = self._dataset(plan.rows[index], stage, features is None)
        evaluated = None
        if plan.eval_rows:
            evaluated = self._dataset(plan.eval_rows, stage, features is None)
        if plan.skipped[index]:
            self.announce(
                f"stage {stage.name!r}: {plan.skipped[index]} of {len(plan.rows[index])} rows have "
                "no image and are left out (text_rows: skip)"
            )
        compute = None if features is None else TowerFeatures(self.model.vision_tower)
        processor = stage_data.with_template(self.processor, stage.template)
        multiple = MASK_WIDTH if plan.device == "cuda" else 1
        collator = Collator(
            processor, cast(Any, stage.text_rows), features, compute=compute, multiple=multiple
        )
        if stage.packing:
            self.model.check_packing(stage.batch_size)
            collator = PackCollator(collator)
        return rows, evaluated, collator

    def _dataset(self, rows: Sequence[Row], stage: Stage, load_images: bool) -> RowDataset:
        return RowDataset(
            rows,
            stage_data.with_template(self.processor, stage.template),
            max_length=stage.max_length,
            text_rows=cast(Any, stage.text_rows),
            on_bad_row=self.plan.recipe.on_bad_row,
            load_images=load_images,
            known_bad=self._known_bad(stage),
            positions=self.model.anatomy.position_table,
        )

    def _known_bad(self, stage: Stage) -> set[tuple[str, str]]:
        skips = self.plan.recipe.on_bad_row == "skip"
        return self.bad_rows.left_out(stage.name) if skips else set()

    def _cached_features(self, rows: Sequence[Row], stage: Stage) -> FeatureCache | None:
        plan, wanted = self.plan, self.plan.recipe.feature_cache
        if wanted is False:
            return None
        tower = self.model.vision_tower
        if self._features is None:
            folder = plan.run / "features" if wanted is True else Path(str(wanted))
            self._features = open_cache(tower, folder.expanduser())
        bad: list[BadRow] | None = [] if plan.recipe.on_bad_row == "skip" else None
        known = self._known_bad(stage)
        if known:
            good = [key_at(rows, at) not in known for at in range(len(rows))]
            rows = select(rows, np.array(good))
        if plan.in_pieces:  # which has not moved anything to a card yet
            tower.to(_device(plan.device))
        workers, ranks = plan.recipe.workers or 0, processes()
        if ranks > 1:
            self._fill_together(rows, None if bad is None else [], workers, ranks)
        count = fill_cache(self._features, tower, rows, bad=bad, workers=workers)
        self.bad_rows.put(bad or [], stage.name, 0)
        self.announce(f"features of {count} images are in {self._features.folder}")
        return self._features

    def _fill_together(
        self, rows: Sequence[Row], bad: list[BadRow] | None, workers: int, ranks: int
    ) -> None:
        """Compute a part of the features in each process; all have them when all are done.

        Raises:
            UsageError: On every process, what went wrong on the first that met something.
        """
        assert self._features is not None
        tower, share = self.model.vision_tower, (int(os.environ.get("RANK", "0")), ranks)
        wrong = None
        try:
            fill_cache(self._features, tower, rows, bad=bad, workers=workers, share=share)
        except UsageError as error:
            wrong = str(error)
        first = next(filter(None, of_all_ranks(wrong, ranks)), None)
        if first is not None:
            raise UsageError(first)

    # -- the model ------------------------------------------------------------------------------

    def _model_for(self, stage: Stage) -> GraftedModel:
        """Load the model with the stage's workflow; one that has no graft yet begins as a copy."""
        assert stage.workflow is not None
        if self.model is not None and stage.workflow in self.model.names:
            return self.model
        self.model = self.processor = self._features = None
        gc.collect()
        folder = self._folder_of(stage.workflow)
        if not (folder / CONFIG_NAME).is_file():
            folder = self.plan.run
        plan = self.plan
        device = _device(plan.device)
        device_map = {"": device} if device != "cpu" or plan.recipe.quantization else None
        if plan.in_pieces and not plan.recipe.quantization:
            device_map = None  # main memory; a card never holds more than its pieces and a layer
        self.announce(f"loading {folder} on {plan.device}")
        model = GraftedModel.from_pretrained(
            folder,
            dtype=loaded_dtype(plan.recipe),
            device_map=device_map,
            quantization=plan.recipe.quantization,
            quantization_storage=torch.bfloat16 if plan.in_pieces else None,
            attn_implementation=plan.recipe.attention,
            graft_dtype=torch.float32,
        )
        _rename(model, stage.workflow)
        self.model = model
        record = model.workflow().record
        record.template.options |= plan.recipe.template_options
        self.processor = model.processor(base_files(record, folder).path)
        return model

    def _folder_of(self, workflow: str) -> Path:
        if workflow == self.plan.record.workflow:
            return self.plan.run
        return self.plan.run / WORKFLOWS / workflow

    def _last_checkpoint(self, index: int, folder: Path) -> Path | None:
        """Find the newest checkpoint of a resumed stage, and drop the metrics after it."""
        plan = self.plan
        resumed = plan.resume and index == plan.first
        found = checkpoint.checkpoints(folder) if resumed else []
        last = found[-1] if found else None
        if resumed and devices.is_main_rank():
            done = {stage.name for stage in plan.stages[:index]}
            step = 0 if last is None else checkpoint.step_of(last)
            metrics.trim(plan.run, done, plan.stages[index].name, step)
        return last

    def _save(self, index: int, model: GraftedModel, size: int, steps: int) -> None:
        """Write the stage's graft, then note that the stage is done, then drop its checkpoints."""
        plan, stage = self.plan, self.plan.stages[index]
        assert stage.workflow is not None
        workflow = model.workflow(stage.workflow)
        workflow.record.recipe = plan.recipe.model_dump(mode="json")
        workflow.record.results = text_change.forgotten(workflow.record.results)
        main = devices.is_main_rank()
        save_graft(model, self._folder_of(stage.workflow), stage.workflow, write=main)
        if not main:
            return
        earlier = checkpoint.read_progress(plan.run) or {}
        checkpoint.write_progress(
            plan.run,
            {
                "recipe": plan.recipe.name,
                "processes": processes(),
                "stages": [one.name for one in plan.stages],
                "finished": [one.name for one in plan.stages[: index + 1]],
                "trained_parameters": {**earlier.get("trained_parameters", {}), stage.name: size},
                "steps": {**earlier.get("steps", {}), stage.name: steps},
            },
        )
        shutil.rmtree(checkpoint.stage_folder(plan.run, index, stage.name), ignore_errors=True)
        self.announce(f"stage {stage.name!r} is done and saved")


class _Batches:
    """A collator's batches without what the model does not take."""

    def __init__(self, collator: Collator | PackCollator) -> None:
        self.collator = collator

    def __call__(self, items: Any) -> dict[str, Any]:
        batch, examples = self.collator(items), examples_of(items)
        del batch["row_ids"]
        batch["rows"] = [example.where for example in examples]  # names more than an id does
        batch["bad_rows"] = [row for example in examples for row in example.skipped]
        batch.pop("workflow", None)  # the trainer names every row's
        return batch | describe(batch)


def _device(device: str) -> str:
    """Return the card of this process, of several; else every rank would fill the first."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


def _rename(model: GraftedModel, name: str) -> None:
    """Give the model's one workflow another name, so that it goes on as another graft."""
    (old,) = model.names
    if old == name:
        return
    workflow = model.workflow(old)
    del model.workflows[old]
    workflow.name = name
    workflow.record = workflow.record.model_copy(update={"workflow": name}, deep=True)
    model.workflows[name] = workflow
    model.default_workflow = name


def _of_worker(error: UsageError) -> str:
    """Return what an error says, without the traceback that a process loading rows adds."""
    name = type(error)
    return str(error).rpartition(f"{name.__module__}.{name.__name__}: ")[2].rstrip()


def _is_final(folder: Path) -> bool:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"]) >= int(state["max_steps"])
