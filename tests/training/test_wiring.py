"""Every key of a recipe reaches what it is for: set off its default, and looked for there.

Two ways: a value is looked for where it must arrive, and every key must be read by something that
is not the recipe itself.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from transformers import TrainerCallback

import mmgraft
from mmgraft.data.formats.layouts import Reading, Vqa
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.model.files.create import create_graft
from mmgraft.recipes.recipe import DataEntry, GraftDefaults, Recipe, Stage
from mmgraft.training.run import plan_training, train
from mmgraft.training.session import Session
from mmgraft.training.stage_data import source_of
from mmgraft.training.trainer import GraftTrainer, training_arguments
from mmgraft.vision.projectors.configs import MlpConfig
from mmgraft.vision.spec import VisionSpec
from tiny_runs import losses, make_run, write_recipe

TUNE: dict[str, Any] = {
    "name": "tune",
    "train": ["projector", "graft"],
    "lr": 1e-3,
    "batch_size": 2,
}


# -- training arguments ------------------------------------------------------------------------

OFF: dict[str, Any] = {
    "epochs": 3.5, "batch_size": 3, "accumulate": 5, "optimizer": "adamw_8bit",
    "weight_decay": 0.07, "betas": (0.81, 0.93), "eps": 3e-7, "schedule": "linear",
    "warmup_ratio": 0.13, "clip_norm": 0.37, "seed": 11,
}  # fmt: skip
OFF_RECIPE: dict[str, Any] = {
    "log_every": 7, "save_every": 13, "eval_every": 17, "workers": 3, "tracking": "tensorboard",
    "eval_data": [{"path": "x.jsonl"}],
}  # fmt: skip

ARGUMENTS: dict[str, Any] = {
    "output_dir": "there", "run_name": "mine", "num_train_epochs": 3.5, "max_steps": -1,
    "per_device_train_batch_size": 3, "per_device_eval_batch_size": 3,
    "gradient_accumulation_steps": 5, "optim": "adamw_8bit", "weight_decay": 0.07,
    "adam_beta1": 0.81, "adam_beta2": 0.93, "adam_epsilon": 3e-7, "lr_scheduler_type": "linear",
    "warmup_steps": 0.13, "max_grad_norm": 0.37, "seed": 11, "logging_steps": 7,
    "logging_strategy": "steps", "logging_first_step": True, "logging_nan_inf_filter": False,
    "save_strategy": "steps", "save_steps": 13, "eval_strategy": "steps", "eval_steps": 17,
    "dataloader_num_workers": 3, "report_to": ["tensorboard"], "prediction_loss_only": True,
    "remove_unused_columns": False, "use_cpu": True, "bf16": False, "fp16": False,
    "average_tokens_across_devices": True, "ddp_find_unused_parameters": False,
    "dataloader_pin_memory": False, "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None, "dataloader_drop_last": False,
}  # fmt: skip
"""No value of them is the Trainer's default where the recipe has a key for it."""


def arguments(device: str = "cpu", **stage: Any) -> Any:
    of_recipe = Recipe.model_fields.keys() - Stage.model_fields.keys()
    more = {name: stage.pop(name) for name in of_recipe & stage.keys()}
    settings = {**{"epochs": None, "max_steps": None}, **stage}
    given = {"name": "s", "train": ["projector"], "lr": 1.0, **settings}
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "method": "iaa",
            **more,
            "stages": [{k: v for k, v in given.items() if v is not None}],
        }
    )
    return training_arguments(recipe, recipe.stages[0], Path("there"), device, "mine")


def test_every_training_argument() -> None:
    made = arguments(**OFF, **OFF_RECIPE)
    found = {name: getattr(made, name) for name in ARGUMENTS}
    assert found == ARGUMENTS
    assert not made.accelerator_config.non_blocking


@pytest.mark.parametrize(
    ("given", "name", "wanted"),
    [
        ({"max_steps": 9}, "max_steps", 9),
        ({"warmup_steps": 4}, "warmup_steps", 4),
        ({"warmup_steps": 0}, "warmup_steps", 0),
        ({}, "warmup_steps", 0),
        ({}, "num_train_epochs", 1.0),
        ({"optimizer": "paged_adamw_8bit"}, "optim", "adamw_8bit"),  # no card to page
        ({"optimizer": "adamw"}, "optim", "adamw_torch"),
        ({"schedule": "constant"}, "lr_scheduler_type", "constant_with_warmup"),
        ({"schedule": "cosine"}, "lr_scheduler_type", "cosine"),
        ({"clip_norm": 0}, "max_grad_norm", 0),
        ({"clip_norm": 2.5}, "max_grad_norm", 2.5),
        ({"save_every": None}, "save_strategy", "no"),
        ({"tracking": "wandb"}, "report_to", ["wandb"]),
        ({}, "report_to", []),
        ({}, "eval_strategy", "no"),
        ({}, "dataloader_num_workers", 0),
    ],
)  # fmt: skip
def test_training_arguments_of_other_settings(
    given: dict[str, Any], name: str, wanted: Any
) -> None:
    assert getattr(arguments(**given), name) == wanted


def test_training_arguments_on_a_card() -> None:
    made = arguments("cuda", workers=3, optimizer="adamw")
    assert made.optim == "adamw_torch_fused"
    assert made.dataloader_pin_memory
    assert made.dataloader_persistent_workers
    assert made.dataloader_prefetch_factor == 4
    assert made.accelerator_config.non_blocking
    assert arguments("cuda", optimizer="paged_adamw_8bit").optim == "paged_adamw_8bit"
    assert arguments("cuda").dataloader_prefetch_factor is None


# -- the optimizer -----------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Keeps the optimizer, and calls `look` with the model before each step."""

    def __init__(self, look: Any = lambda model: None) -> None:
        self.look, self.optimizer, self.model = look, None, None

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        self.optimizer, self.model = optimizer.optimizer, model
        self.look(model)


def one_stage(run: Path, parts: Path, stage: dict[str, Any], *more: Any, **recipe: Any) -> Watch:
    write_recipe(run, parts, "iaa", [stage], **{"save_every": None, **recipe})
    watch = Watch(*more)
    Session(plan_training(run), lambda text: None).run_stage(0, [watch])
    return watch


def test_norms_and_biases_do_not_decay(parts: Path, tmp_path: Path) -> None:
    run = make_run(parts, tmp_path / "run", "iaa", embedding=True, head=True)
    rates = {"projector": 3e-4, "norm": 5e-4, "default": 7e-4}
    stage = {**TUNE, "lr": rates, "weight_decay": 0.03, "betas": [0.8, 0.93], "eps": 1e-6}
    watch = one_stage(run, parts, {**stage, "max_steps": 1, "schedule": "constant"})
    names = {id(parameter): name for name, parameter in watch.model.named_parameters()}
    seen: list[str] = []
    for group in watch.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.93), 1e-6)
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            plain = parameter.ndim < 2  # a norm's weight, a bias
            assert group["weight_decay"] == (0.0 if plain else 0.03), name
            part = "projector" if ".projector." in name else "default"
            part = "norm" if ".graft.norm." in name else part
            assert group["lr"] == rates[part], name
    trained = [name for name, p in watch.model.named_parameters() if p.requires_grad]
    assert sorted(seen) == sorted(trained)
    assert any(name.endswith("bias") for name in seen)
    assert any("layernorm" in name for name in seen)
    assert len(seen) > 20


def test_weights_decay_by_what_the_stage_says(parts: Path, tmp_path: Path) -> None:
    """With a gradient of 0 AdamW only decays: by rate times decay."""
    before: dict[str, torch.Tensor] = {}

    def look(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                before[name] = parameter.detach().clone()
                parameter.grad.zero_()

    run = make_run(parts, tmp_path / "run", "iaa")
    stage = {**TUNE, "lr": 0.1, "weight_decay": 0.5, "max_steps": 1, "schedule": "constant"}
    watch = one_stage(run, parts, stage, look)
    for name, parameter in watch.model.named_parameters():
        if parameter.requires_grad:
            wanted = before[name] * (0.95 if parameter.ndim > 1 else 1.0)
            torch.testing.assert_close(parameter.detach(), wanted, msg=name)


def test_states_in_8_bit_are_no_embeddings(parts: Path, tmp_path: Path) -> None:
    """bitsandbytes keeps tensors of less than 4,096 numbers in 32 bits; these have more."""
    torch.manual_seed(0)
    run = tmp_path / "run"
    config = IAAConfig(layers=[1], embedding=True, head=True, untie=False)
    vision = VisionSpec(id=str(parts / "tower"))
    create_graft(str(parts / "base"), vision, config, run, projector=MlpConfig(hidden=256))
    watch = one_stage(run, parts, {**TUNE, "optimizer": "adamw_8bit", "max_steps": 1})
    dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
    for name, parameter in watch.model.named_parameters():
        if parameter.requires_grad and parameter.numel() >= 4096:
            state = watch.optimizer.state[parameter]
            kind = "embedding" if ".embedding." in name else "other"
            dtypes[kind] |= {state["state1"].dtype, state["state2"].dtype}
    assert dtypes == {"embedding": {torch.float32}, "other": {torch.uint8}}


# -- logs --------------------------------------------------------------------------------------


def test_a_logged_loss_is_the_mean_of_the_steps_since_the_last(parts: Path, tmp_path: Path) -> None:
    """Logs after the steps 1, 3, 6 and 7: of one step, two, three, and one."""
    stage = {**TUNE, "max_steps": 7, "accumulate": 2}
    every, some = (make_run(parts, tmp_path / name, "iaa") for name in ("every", "some"))
    one_stage(every, parts, stage, log_every=1)
    one_stage(some, parts, stage, log_every=3)
    steps = [loss for _, _, loss in losses(every)]
    assert len(set(steps)) == 7
    found = [(step, loss) for _, step, loss in losses(some)]
    assert [step for step, _ in found] == [1, 3, 6, 7]
    begins = [0, 1, 3, 6]
    for (end, loss), begin in zip(found, begins, strict=True):
        assert loss == pytest.approx(sum(steps[begin:end]) / (end - begin), rel=1e-5)


# -- what the trainer and its rows are given ---------------------------------------------------


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return what each Trainer is made with."""
    seen: list[dict[str, Any]] = []
    real = GraftTrainer.__init__

    def made(self: Any, model: Any, args: Any, *others: Any, **more: Any) -> None:
        seen.append({"args": args, "sampler": others[-1], **more})
        real(self, model, args, *others, **more)

    monkeypatch.setattr(GraftTrainer, "__init__", made)
    return seen


def test_settings_arrive_at_the_trainer(parts: Path, tmp_path: Path, given, monkeypatch) -> None:
    run = make_run(parts, tmp_path / "run", "iaa")
    entry = {"path": str(parts / "rows.jsonl"), "images": str(parts / "images"), "limit": 5}
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    stage = {
        **TUNE, "max_steps": 2, "max_length": 41, "template": str(template), "text_rows": "graft",
        "seed": 23, "gradient_checkpointing": True,
    }  # fmt: skip
    seen: list[Any] = []
    watch = one_stage(
        run, parts, stage, lambda model: seen.append(model.gradient_checkpointing),
        keep_checkpoints=7, eval_data=[entry], eval_every=1, attention="eager", on_bad_row="skip",
        save_every=1,
    )  # fmt: skip
    (made,) = given
    assert seen == [True, True]
    assert made["keep"] == 7
    assert made["sampler"].seed == 23
    assert made["args"].seed == 23
    assert watch.model.base.config._attn_implementation == "eager"
    for rows in (made["train_dataset"], made["eval_dataset"]):
        assert rows.max_length == 41
        assert rows.on_bad_row == "skip"
        assert rows.processor.template.text == template.read_text()
    assert (len(made["train_dataset"]), len(made["eval_dataset"])) == (12, 5)
    assert made["data_collator"].collator.processor.template.text == template.read_text()
    assert made["data_collator"].collator.text_rows == "graft"


def test_checkpoints_are_kept_as_many_as_asked(parts: Path, tmp_path: Path) -> None:
    run = make_run(parts, tmp_path / "run", "iaa")
    folder = run / "checkpoints" / "1-tune"
    seen: list[int] = []

    def look(model: Any) -> None:
        seen.append(len(list(folder.glob("checkpoint-*"))))

    one_stage(run, parts, {**TUNE, "max_steps": 6}, look, save_every=1, keep_checkpoints=3)
    assert seen == [0, 1, 2, 3, 3, 3]


# -- rows --------------------------------------------------------------------------------------


def planned(run: Path, parts: Path, entry: dict[str, Any], **more: Any) -> list[str]:
    stage = {**TUNE, **more.pop("stage", {})}
    data = {"path": str(parts / "rows.jsonl"), "images": str(parts / "images"), **entry}
    write_recipe(run, parts, "iaa", [stage], **{"data": [data], **more})
    rows = plan_training(run).rows[0]
    return [rows[at].id for at in range(len(rows))]


def test_rows_follow_their_settings(parts: Path, tmp_path: Path) -> None:
    run = make_run(parts, tmp_path / "run", "iaa")
    every = planned(run, parts, {})
    assert sorted(every, key=int) == [str(n) for n in range(12)]
    assert sorted(planned(run, parts, {"limit": 5}), key=int) == [str(n) for n in range(5)]
    twice = planned(run, parts, {"weight": 2})
    assert len(twice) == 24
    assert len(planned(run, parts, {"weight": 0.3})) == 4  # 3.6
    assert len(planned(run, parts, {"weight": 1.45})) == 17  # 17.4
    assert planned(run, parts, {}, seed=1) != every
    assert planned(run, parts, {}, seed=1) == planned(run, parts, {}, seed=1)
    share = planned(run, parts, {}, stage={"image_share": 0.25, "text_rows": "graft"})
    assert len([one for one in share if int(one) % 4 != 3]) == 3
    assert len(share) == 12
    of_recipe = planned(run, parts, {}, image_share=0.5, text_rows="graft")
    assert len([one for one in of_recipe if int(one) % 4 != 3]) == 6


def test_a_stage_has_its_own_rows(parts: Path, tmp_path: Path) -> None:
    run = make_run(parts, tmp_path / "run", "iaa")
    data = [{"path": str(parts / "rows.jsonl"), "images": str(parts / "images"), "limit": 4}]
    write_recipe(run, parts, "iaa", [{**TUNE, "data": data}, {**TUNE, "name": "two"}])
    assert [len(rows) for rows in plan_training(run).rows] == [4, 12]


def test_a_source_is_all_that_its_entry_says() -> None:
    entry = DataEntry(
        path="hub:a/b", images="pics", format="vqa", limit=7, split="test", subset="small",
        revision="v1", columns={"question": "q"}, vqa={"seed": 3, "answer": "sampled"},
    )  # fmt: skip
    found = source_of(entry)
    assert (found.path, found.images, found.limit) == ("hub:a/b", "pics", 7)
    assert found.reading == Reading("vqa", {"question": "q"}, Vqa(seed=3, answer="sampled"))
    assert (found.split, found.subset, found.revision) == ("test", "small", "v1")


# -- no key is read by nothing -----------------------------------------------------------------

PACKAGE = Path(mmgraft.__file__).parent
NOT_TRAINED_BY = {
    "description": "said by `mmgraft recipes ls`",
    "graft": "read by `mmgraft graft`; tests/cli/test_wiring.py",
    "evaluation": "read by `mmgraft eval`",
    "method": "compared with the graft's where a recipe is read",
    **dict.fromkeys(("workflow", "text_rows", "image_share"), "each stage has it; test_recipe.py"),
}
"""Keys of a recipe that a training does not read."""


@pytest.fixture(scope="module")
def read(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Attributes of a recipe, its stages and entries that mmgraft reads outside of `recipes/`."""
    seen: dict[str, set[str]] = defaultdict(set)
    own = str(PACKAGE / "recipes")

    def watched(self: Any, name: str) -> Any:
        place = sys._getframe(1).f_code.co_filename
        if place.startswith(str(PACKAGE)) and not place.startswith(own):
            for kind in (Stage, Recipe, DataEntry, GraftDefaults):
                if isinstance(self, kind):
                    seen[kind.__name__].add(name)
        return object.__getattribute__(self, name)

    run = make_run(parts, tmp_path_factory.mktemp("read") / "run", "iaa")
    entry = {"path": str(parts / "rows.jsonl"), "images": str(parts / "images"), "limit": 8}
    write_recipe(
        run, parts, "iaa", [{**TUNE, "max_steps": 1}, {**TUNE, "name": "b", "max_steps": 1, "packing": True, "max_length": 64}],  # noqa: E501
        eval_data=[entry], eval_every=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseModel, "__getattribute__", watched, raising=False)
        train(plan_training(run))
    return seen


KEYS = [(kind.__name__, key) for kind in (Stage, Recipe, DataEntry) for key in kind.model_fields]


@pytest.mark.parametrize(("kind", "key"), KEYS, ids=lambda part: part)
def test_every_key_is_read_by_a_training(read: dict[str, set[str]], kind: str, key: str) -> None:
    assert key in read[kind] or (kind == "Recipe" and key in NOT_TRAINED_BY)


def test_what_a_run_used_is_written_down_whole(parts: Path, tmp_path: Path) -> None:
    """The graft's record has the recipe, every setting resolved."""
    run = make_run(parts, tmp_path / "run", "iaa")
    one_stage(run, parts, {**TUNE, "max_steps": 1, "betas": [0.8, 0.93]}, seed=5, log_every=3)
    saved = json.loads((run / "graft_config.json").read_text())["recipe"]
    assert (saved["seed"], saved["log_every"]) == (5, 3)
    assert saved["stages"][0]["betas"] == [0.8, 0.93]
    assert saved["stages"][0]["seed"] == 5
