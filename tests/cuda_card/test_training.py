"""`mmgraft train` on a make-believe card: the losses of a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from mmgraft.errors import UsageError
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.training import devices
from mmgraft.training.run import plan_training, train
from pretend_cuda import pretend_cuda
from pretend_flash import pretend_flash
from tiny_runs import losses, make_parts, make_run, write_recipe

BOTH = ["projector", "graft"]
TRAINED = {"llava": ["projector"], "iaa": BOTH, "wings": BOTH, "lora": BOTH, "xattn": BOTH}

# method, what the stage switches, what the recipe does, how near the losses are
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "bf16": ("wings", {}, {"precision": "bf16", "eval_every": 1}, 1e-2),
    "bf16 llava": ("llava", {"group_by": "length"}, {"precision": "bf16"}, 1e-2),
    "checkpointing": ("iaa", {"gradient_checkpointing": True}, {"precision": "bf16"}, 1e-2),
    "packing": ("wings", {"packing": True, "max_length": 64}, {"feature_cache": True}, 1e-5),
    "workers": ("iaa", {}, {"workers": 1}, 1e-5),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


def make(parts: Path, run: Path, method: str, switches: dict[str, Any], **settings: Any) -> Path:
    make_run(parts, run, method)
    stage = {"name": "tune", "train": TRAINED[method], "lr": 1e-3, "batch_size": 2}
    if "eval_every" in settings:
        held = {"path": str(parts / "rows.jsonl"), "images": str(parts / "images")}
        settings["eval_data"] = [held]
    settings = {"workers": 0, **settings}
    write_recipe(run, parts, method, [{**stage, "max_steps": 2, **switches}], **settings)
    return run


@pytest.mark.parametrize("case", CASES)
def test_losses(case: str, parts: Path, tmp_path: Path) -> None:
    method, switches, settings, near = CASES[case]
    plain, there = (make(parts, tmp_path / n, method, switches, **settings) for n in "ab")
    train(plan_training(plain, device="cpu"))
    with pretend_cuda():
        train(plan_training(there, device="cuda"))
    for found, wanted in zip(losses(there), losses(plain), strict=True):
        assert found[:2] == wanted[:2]
        assert found[2] == pytest.approx(wanted[2], abs=near)


def test_a_whole_base_trains_with_flash_attention(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_check_installed", lambda *_: None)
    switches = {"train": ["projector", "base"], "packing": True, "batch_size": 1, "max_length": 64}
    settings = {"base": "full", "attention": "flash_attention_2", "precision": "bf16"}
    run = make(parts, tmp_path / "run", "llava", switches, **settings)
    with pretend_cuda(), pretend_flash() as calls:
        train(plan_training(run, device="cuda"))
    assert calls.widths
    assert "text_change" in (GraftFile.read(run).results or {})


def test_flash_attention_in_fp32_is_refused(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_check_installed", lambda *_: None)
    run = make(parts, tmp_path / "run", "llava", {}, attention="flash_attention_2")
    with pretend_cuda(), pytest.raises(UsageError, match="precision: bf16, or attention: sdpa"):
        plan_training(run, device="cuda")


class Stop(TrainerCallback):
    """Ends the process, as it were, before the last step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise RuntimeError("stopped here")


def test_a_resumed_run_goes_on_as_if_never_stopped(parts: Path, tmp_path: Path) -> None:
    switches = {"max_steps": 3}
    whole, stopped = (make(parts, tmp_path / n, "iaa", switches, save_every=1) for n in "ab")
    with pretend_cuda():
        train(plan_training(whole, device="cuda"))
        with pytest.raises(RuntimeError, match="stopped here"):
            train(plan_training(stopped, device="cuda"), display=lambda *_: [Stop()])
        assert len(losses(stopped)) == 2
        train(plan_training(stopped, device="cuda", resume=True))
    assert losses(stopped) == losses(whole)
