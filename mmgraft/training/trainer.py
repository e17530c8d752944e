"""transformers' Trainer for one stage: rates by group, exact counts, graft-only checkpoints."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mmgraft.data.rows import BadRow
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.sharded import gathered
from mmgraft.recipes.recipe import Recipe, Stage
from mmgraft.training import checkpoint, devices, row_order, stages
from mmgraft.training.callbacks.metrics import EvalSum, LossSum, counted
from mmgraft.training.callbacks.stopping import FiniteWatch, RandomState
from mmgraft.training.distributed import sharding
from mmgraft.training.distributed.parallel import of_all_ranks

_OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "adamw_8bit"}
_ON_CUDA = {**_OPTIMIZERS, "adamw": "adamw_torch_fused", "paged_adamw_8bit": "paged_adamw_8bit"}
#: Facts of a batch on the host, see :func:`describe`: no card is waited for.
ABOUT = ("rows", "bad_rows", "supervised", "with_image", "positions", "on_host")
_ON_HOST = ("image_sizes", "image_lengths", "image_rows")
_PREFETCHED = 4  # batches that each worker has ready for a card
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def training_arguments(
    recipe: Recipe, stage: Stage, folder: Path, device: str, run_name: str
) -> TrainingArguments:
    """Write a stage's settings as transformers' Trainer takes them.

    Precision is left to :class:`GraftTrainer`, which computes under autocast itself, so that no
    model is wrapped or cast and frozen modules keep their own dtype.
    """
    on_card, workers = device == "cuda", recipe.workers or 0
    arguments = TrainingArguments(
        output_dir=str(folder),
        run_name=run_name,
        use_cpu=device == "cpu",
        num_train_epochs=stage.epochs or 1.0,
        max_steps=stage.max_steps or -1,
        per_device_train_batch_size=stage.batch_size,
        per_device_eval_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.accumulate,
        optim=(_ON_CUDA if on_card else _OPTIMIZERS)[stage.optimizer],
        weight_decay=stage.weight_decay,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        adam_epsilon=stage.eps,
        lr_scheduler_type=_SCHEDULES[stage.schedule],
        warmup_steps=stage.warmup_ratio or 0 if stage.warmup_steps is None else stage.warmup_steps,
        max_grad_norm=stage.clip_norm,
        seed=stage.seed or 0,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no" if recipe.save_every is None else "steps",
        save_steps=recipe.save_every or 500,
        eval_strategy="no" if recipe.eval_every is None else "steps",
        eval_steps=recipe.eval_every,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=on_card and workers > 0,
        dataloader_prefetch_factor=_PREFETCHED if on_card and workers else None,
        dataloader_pin_memory=on_card,
        accelerator_config={"non_blocking": on_card},  # a copy of pinned memory is not waited for
        ddp_find_unused_parameters=False,
        report_to=[] if recipe.tracking == "none" else [recipe.tracking],
        disable_tqdm=True,
        average_tokens_across_devices=True,
    )
    if arguments.world_size == 1:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several cards want torchrun, not DataParallel
    return arguments


class GraftTrainer(Trainer):
    """One stage.

    Args:
        model: The grafted model, opened for the stage.
        args: From :func:`training_arguments`.
        stage: Of a resolved recipe.
        groups: Trained parameters by learning rate.
        sampler: The order of the rows.
        keep: Checkpoints to keep.
        callbacks: Further callbacks.
        on_bad: Is called with the rows that a batch had to do without, and the step.
        data: The Trainer's ``train_dataset``, ``eval_dataset`` and ``data_collator``.
    """

    def __init__(
        self,
        model: GraftedModel,
        args: TrainingArguments,
        stage: Stage,
        groups: Sequence[stages.RateGroup],
        sampler: row_order.Order,
        *,
        keep: int,
        callbacks: Sequence[TrainerCallback],
        on_bad: Callable[[Sequence[BadRow], int], None],
        **data: Any,
    ) -> None:
        self.grafted: Any = model  # the Trainer's own `model` may be wrapped
        self.on_bad = on_bad
        self.stage = stage
        self.groups = list(groups)
        self.keep = keep
        self.sampler = sampler
        self._tokens = 0
        self._since = time.perf_counter()
        self.rates: dict[str, float] = {}
        self.readings: dict[str, float] = {}  # the graft's, at the last log
        self._watch = FiniteWatch(stage.name, args.device)
        self._losses = LossSum()
        self._evaluated = EvalSum()
        self._random: RandomState | None = None
        self._about: dict[str, Any] = {}  # of the batch at hand, known on the host
        super().__init__(
            model=self.grafted, args=args, callbacks=[_Epochs(self), *callbacks], **data
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._spare_ranks()

    def _spare_ranks(self) -> None:
        """Hold gradients once where ranks exchange them, and send nothing that is frozen."""
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        frozen = [name for name, p in self.grafted.named_parameters() if not p.requires_grad]
        constant = [name for name, _ in self.grafted.named_buffers()]
        self.grafted._ddp_params_and_buffers_to_ignore = [*frozen, *constant]

    # -- parameters -----------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW with a parameter group for every rate; of what decays, matrices alone do."""
        if self.optimizer is None:
            decays = set(self.get_decay_parameter_names(self.grafted))
            parts: list[dict[str, Any]] = []
            for group in self.groups:
                for decay in (True, False):
                    chosen = [
                        parameter
                        for name, parameter in group.parameters.items()
                        if (name in decays and parameter.dim() > 1) == decay
                    ]
                    if chosen:
                        weight = self.args.weight_decay if decay else 0.0
                        parts.append(
                            {"params": chosen, "lr": group.lr, "weight_decay": weight,
                             "name": group.name}
                        )  # fmt: skip
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.grafted)
            options.pop("lr", None)
            self.optimizer = kind(parts, lr=self.groups[0].lr, **options)
            self._keep_embeddings_whole(kind)
        return self.optimizer

    def _keep_embeddings_whole(self, kind: type) -> None:
        """Keep 32-bit optimizer states of embeddings: their gradients are sparse and uneven."""
        if not kind.__module__.startswith("bitsandbytes"):
            return
        from bitsandbytes.optim.optimizer import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        for module in self.grafted.modules():
            if isinstance(module, nn.Embedding) and module.weight.requires_grad:
                manager.register_module_override(module, "weight", {"optim_bits": 32})

    # -- data -----------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> row_order.Order:
        return self.sampler

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> Tensor | int | None:
        """Supervised tokens of a whole step, over all ranks, of rows that train something."""
        if "supervised" not in batch_samples[0]:
            return None  # a batch to evaluate on, which is divided by its own
        every = self.stage.text_rows != "skip"
        total = sum(
            tokens
            for batch in batch_samples
            for tokens, image in zip(batch["supervised"], batch["with_image"], strict=True)
            if image or every
        )
        if self.args.world_size == 1:
            return total
        return cast(Tensor, self.accelerator.gather(torch.tensor(total, device=device))).sum()

    def _workflows(self) -> list[str]:
        """Choose the workflow of each row: rows without an image train what ``text_rows`` says."""
        own, every = cast(str, self.stage.workflow), self.stage.text_rows == "graft"
        return [own if image or every else "text" for image in self._about["with_image"]]

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        self._about = {name: inputs.pop(name) for name in ABOUT}
        if bad := self._about["bad_rows"]:
            self.on_bad(bad, self.state.global_step + self.grafted.training)
        on_host = {name: torch.tensor(values) for name, values in self._about["on_host"].items()}
        return {**super()._prepare_inputs(inputs), **on_host}

    # -- the step -------------------------------------------------------------------------------

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        """Compute in bf16 over fp32 parameters; a stage in fp32 is left alone."""
        if self.stage.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(
            self.args.device.type, dtype=torch.bfloat16, cache_enabled=bool(cache_enabled)
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss: summed over supervised tokens, divided by those of the whole step.

        Of a batch to evaluate on: divided by its own.
        """
        if not torch.is_grad_enabled():
            outputs = model(**inputs, workflow=self._workflows())
            loss, count = counted(outputs.loss, inputs["labels"])
            self._watch.note_evaluated(self._about["rows"], loss)
            self._evaluated.add(loss, count)
            return (loss, outputs) if return_outputs else loss
        outputs = model(**inputs, workflow=self._workflows(), num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        self._watch.note(self._about["rows"], loss)
        averaged = num_items_in_batch is not None and self.args.world_size > 1
        if averaged:
            loss = loss * self.args.world_size  # because ranks average their gradients
        # Each rank must have a gradient for every trained parameter, and a loss must have one where
        # rows without an image alone train only a projector. A sharded model sees to it by layer.
        if not sharding.is_sharded(self.grafted) if averaged else not loss.requires_grad:
            loss = loss + self.grafted.touch()
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one forward and backward pass, and count positions for the display."""
        self._tokens += inputs["positions"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.add(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = sharding.whole_norm(super()._get_grad_norm(model, grad_norm=grad_norm))
        self._watch.check_step(self.state.global_step + 1, norm, self.args.world_size)
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._losses.keep(self.state.global_step)
        self._random = RandomState.now(self.state.global_step)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: they are not counted."""
        return 0

    # -- logs -----------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add rates by group, speed and memory to what every tracker gets.

        Raises:
            NotFinite: The loss of an evaluation is nan or inf.
        """
        if "eval_loss" in logs:
            logs["eval_loss"] = self._mean_evaluated()
            step, ranks = self.state.global_step, self.args.world_size
            self._watch.check_evaluation(step, logs["eval_loss"], ranks)
        if "loss" in logs:
            logs["loss"] = self._mean_loss()
            now = time.perf_counter()
            logs["tokens_per_second"] = self._tokens / max(now - self._since, 1e-9)
            self._tokens, self._since = 0, now
            memory = devices.memory_in_use(self.args.device.type)
            if memory is not None:
                logs["memory_gb"] = memory / 1e9
            logs.pop("learning_rate", None)
            logs.update({f"lr/{name}": rate for name, rate in self.rates.items()})
            logs.update({f"graft/{name}": value for name, value in self._read().items()})
        super().log(logs, start_time)

    def _read(self) -> dict[str, float]:
        """Return what the graft has to say of itself, the largest of several numbers."""
        graft = self.grafted.workflow(self.stage.workflow).graft
        with torch.no_grad():
            whole = gathered(graft.readings())
            largest = {name: one.flatten()[one.abs().argmax()] for name, one in whole.items()}
            found = torch.stack(list(largest.values())).tolist() if largest else []
        self.readings = dict(zip(largest, found, strict=True))
        return self.readings

    def _mean_loss(self) -> float:
        """Average the steps since the last log, over all ranks and over sessions."""
        step, steps = self.state.global_step, self.state.global_step - self._losses.step
        mean = float(self._loss_sums().mean()) / steps
        self._losses.begin(step)
        return mean

    def _mean_evaluated(self) -> float:
        """Average over the supervised tokens of all rows, on all ranks."""
        total, tokens = map(self._of_all, self._evaluated.take(self.args.device))
        return float(total.sum() / tokens.sum().clamp(min=1))

    def _loss_sums(self) -> Tensor:
        """Return the losses since the last log, one sum a rank."""
        return self._of_all(self._losses.value().to(self.args.device))

    def _of_all(self, own: Tensor) -> Tensor:
        return own if self.args.world_size == 1 else cast(Tensor, self.accelerator.gather(own))

    # -- checkpoints ----------------------------------------------------------------------------

    def save_now(self) -> None:
        """Write a checkpoint of the last step that was taken, as it would have been then."""
        if self._random is not None and self._random.step == self.state.global_step:
            self._random.restore()
        self._losses.restore(self.state.global_step)
        self._save_checkpoint(self.grafted)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        folder, writes = Path(cast(str, self.args.output_dir)), self.args.should_save
        sums, states = self._loss_sums(), self._random_states()
        trained = checkpoint.trained_tensors(self.grafted, writes)
        sharded = sharding.is_sharded(self.grafted)
        optimizer = sharding.whole_state(self.optimizer, writes) if sharded else None

        def write(path: Path) -> None:
            checkpoint.save_tensors(trained, path)
            if optimizer is None:
                self._save_optimizer_and_scheduler(str(path))
            else:
                torch.save(optimizer, path / "optimizer.pt")
                torch.save(cast(Any, self.lr_scheduler).state_dict(), path / "scheduler.pt")
            self._save_rng_state(str(path))
            for name, state in states.items():
                (path / name).write_bytes(state)
            self._losses.write(path, sums)
            self.state.save_to_json(str(path / "trainer_state.json"))

        if writes:
            checkpoint.write_checkpoint(folder / f"checkpoint-{self.state.global_step}", write)
            checkpoint.rotate(folder, self.keep)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and sharding.is_sharded(self.grafted):
            sharding.pieces_of_state(self.optimizer)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not sharding.is_sharded(model):  # which stands where it belongs
            super()._move_model_to_device(model, device)

    def _random_states(self) -> dict[str, bytes]:
        """Random numbers to come of all ranks, by file: one checkpoint holds them, whole."""
        if self.args.world_size == 1:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            found = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        parts = of_all_ranks(found, self.args.world_size)
        return {name: state for part in parts for name, state in part.items()}

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder, args = Path(resume_from_checkpoint), self.args
        checkpoint.load_tensors(self.grafted, folder)
        self._losses.read(folder, args.process_index, args.world_size, args.device)


class _Epochs(TrainerCallback):
    """Sets the sampler's epoch, keeps the rates of a step, and has the last step logged."""

    def __init__(self, trainer: GraftTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        groups = cast(Any, self.trainer.optimizer).param_groups
        self.trainer.rates = {group["name"]: group["lr"] for group in groups}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


def describe(batch: dict[str, Any]) -> dict[str, Any]:
    """Count what the trainer wants to know of a batch, before it goes to a card.

    Returns:
        ``supervised`` tokens and whether there is an image ``with_image``, a list by row; all
        ``positions`` that are no padding; and what the model reads ``on_host``, taken out of the
        batch.
    """
    kinds, labels = batch.get("mm_token_type_ids"), batch["labels"]
    none = torch.zeros(len(labels), dtype=torch.bool)
    return {
        "supervised": (labels[:, 1:] != -100).sum(dim=1).tolist(),
        "with_image": (none if kinds is None else (kinds != 0).any(dim=1)).tolist(),
        "positions": int(batch["attention_mask"].sum()),
        "on_host": {name: batch.pop(name).tolist() for name in _ON_HOST if name in batch},
    }
