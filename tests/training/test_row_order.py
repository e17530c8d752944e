"""Orders of rows that stand together: the same for a seed and an epoch, on all ranks, on resume."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import TrainerCallback

from mmgraft.data.batches.sampler import EpochSampler
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.recipes.recipe import Stage
from mmgraft.training.callbacks.stopping import TrainingStopped
from mmgraft.training.row_order import LENGTHS, GroupSampler, PackSampler, arrange
from mmgraft.training.run import plan_training, train
from mmgraft.training.session import Session
from tiny_runs import losses, make_run, write_recipe


def order(sampler: Any, epoch: int) -> list[Any]:
    sampler.set_epoch(epoch)
    return list(sampler)


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any)


@given(lengths, st.integers(40, 700))
@settings(max_examples=60, deadline=None)
def test_every_usable_row_stands_in_one_pack_that_fits(rows: list[int], capacity: int) -> None:
    """Above 512 positions lengths are rounded, up: a pack never holds more than fits."""
    sampler = PackSampler(torch.tensor(rows), capacity, seed=3)
    for epoch in (0, 1):
        packs = order(sampler, epoch)
        assert len(packs) == len(sampler)
        assert sorted(at for pack in packs for at in pack) == [
            at for at, length in enumerate(rows) if length
        ]
        assert all(0 < sum(rows[at] for at in pack) <= capacity for pack in packs)


def test_a_row_as_long_as_a_sequence_has_one_to_itself() -> None:
    """513 positions are 256 units of 2 and a rest."""
    packs = order(PackSampler(torch.tensor([513, 1, 511, 1]), 513), 0)
    assert sorted(map(sorted, packs)) == [[0], [1, 3], [2]]


def test_packs_are_full_and_drawn_anew_every_epoch() -> None:
    rows = torch.randint(5, 60, (400,), generator=torch.Generator().manual_seed(0))
    sampler = PackSampler(rows, 128, seed=3)
    assert len(sampler) * 128 < 1.03 * int(rows.sum())
    first, second = order(sampler, 0), order(sampler, 1)
    assert len(set(map(frozenset, first)) & set(map(frozenset, second))) < len(first) / 4
    torch.manual_seed(99)
    assert order(PackSampler(rows, 128, seed=3), 1) == second
    assert order(PackSampler(rows, 128, seed=4), 1) != second


def test_kinds_that_are_kept_apart_share_no_pack() -> None:
    kinds = torch.tensor([True, False] * 20)
    packs = order(PackSampler(torch.full((40,), 10), 60, apart=kinds), 0)
    assert all(len({bool(kinds[at]) for at in pack}) == 1 for pack in packs)
    assert len(packs) == 8


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(UsageError, match="not one row can be used"):
        PackSampler(torch.zeros(3, dtype=torch.long), 64)


@given(st.integers(1, 90), st.integers(1, 8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_grouped_rows_come_once_each(count: int, together: int, sort: bool) -> None:
    keys = torch.arange(count) % 7 if sort else torch.arange(count) % 2
    sampler = GroupSampler(keys, together, seed=1, sort=sort)
    rows = order(sampler, 2)
    assert sorted(rows) == list(range(count)) == list(range(len(sampler)))
    assert order(GroupSampler(keys, together, seed=1, sort=sort), 2) == rows


def test_rows_of_a_batch_are_alike_in_length() -> None:
    keys = torch.randint(0, 1000, (1003,), generator=torch.Generator().manual_seed(0))
    rows = order(GroupSampler(keys, 4), 0)
    assert rows != order(GroupSampler(keys, 4), 1)
    batches = keys[torch.tensor(rows[:1000])].view(-1, 4)
    spread = (batches.amax(1) - batches.amin(1)).float()
    assert spread.mean() < 20  # at random it is about 600
    means = batches.float().mean(1)
    assert torch.corrcoef(torch.stack([means[1:], means[:-1]]))[0, 1].abs() < 0.3  # in any order


def test_rows_with_and_without_an_image_stand_apart() -> None:
    """Put what fills no batch last, so that it moves no other batch's border."""
    kinds = (torch.arange(51) % 3 == 0).long()  # 17 and 34
    rows = torch.tensor(order(GroupSampler(kinds, 4, sort=False), 0))
    batches = kinds[rows[:48]].view(-1, 4)
    assert all(batch.unique().numel() == 1 for batch in batches)
    assert int(batches[:, 0].diff().abs().sum()) > 4  # the two kinds alternate


class Rows:
    """Nine rows of 3 to 11 positions, every third with an image."""

    def __init__(self) -> None:
        image = [{"type": "image", "image": "x.png"}]
        turns = [
            [
                {"role": "user", "content": "?" if at % 3 else image},
                {"role": "assistant", "content": "a"},
            ]
            for at in range(9)
        ]
        self.rows = [Row(str(at), turn) for at, turn in enumerate(turns)]

    def __len__(self) -> int:
        return 9

    def length(self, at: int) -> int:
        return 3 + at


def arranged(tmp_path: Path, ranks: int = 1, **settings: Any) -> Any:
    stage = Stage.model_validate(
        {"name": "s", "train": ["projector"], "lr": 1.0, "batch_size": 2, "seed": 5, **settings}
    )
    return arrange(Rows(), stage, tmp_path, ranks)  # type: ignore[arg-type]


def test_what_a_stage_says_reaches_the_order(tmp_path: Path) -> None:
    plain = arranged(tmp_path).sampler
    assert (type(plain), plain.seed, len(plain)) == (EpochSampler, 5, 9)
    by_kind = arranged(tmp_path, 3, group_by="modality").sampler
    assert (by_kind.together, by_kind.seed, by_kind.sort) == (6, 5, False)
    assert by_kind.keys.tolist() == [1, 0, 0] * 3
    by_length = arranged(tmp_path, 3, group_by="length").sampler
    assert (by_length.together, by_length.seed, by_length.sort) == (6, 5, True)
    assert by_length.keys.tolist() == list(range(3, 12))


@pytest.mark.parametrize("text_rows", ["graft", "base"])
def test_rows_of_two_workflows_share_a_sequence_where_they_run_one(
    tmp_path: Path, text_rows: str
) -> None:
    """With `base` rows without an image run the base alone."""
    found = arranged(tmp_path, packing=True, max_length=40, text_rows=text_rows)
    assert found.sampler.seed == 5
    packs = order(found.sampler, 0)
    assert sorted(at for pack in packs for at in pack) == list(range(9))
    assert all(sum(3 + at for at in pack) <= 40 for pack in packs)
    mixed = any(len({at % 3 == 0 for at in pack}) == 2 for pack in packs)
    assert mixed == (text_rows == "graft")
    assert found.says.startswith(f"stage 's': 9 rows in {len(packs)} sequences of up to 40")


# -- trainings: 12 rows, of which 9 have a picture -------------------------------------------------

ALL = {"train": ["projector", "graft"], "text_rows": "graft", "lr": 1e-3}


def test_three_steps_of_packs_are_three_steps_of_rows(parts: Path, tmp_path: Path) -> None:
    """Every step takes all rows, so that only the packing differs."""
    stages = {
        "rows": {"batch_size": 12},
        "packs": {"batch_size": 2, "accumulate": 20, "packing": True, "max_length": 100},
    }
    said: list[str] = []
    for name, more in stages.items():
        run = make_run(parts, tmp_path / name, "wings")
        stage = {"name": "one", "epochs": 3, **ALL, **more}
        write_recipe(run, parts, "wings", [stage])
        train(plan_training(run, device="cpu"), announce=said.append)
    wanted = [loss for *_, loss in losses(tmp_path / "rows")]
    found = [loss for *_, loss in losses(tmp_path / "packs")]
    assert len(wanted) == 3
    assert found == pytest.approx(wanted, abs=1e-5)
    (line,) = [text for text in said if "sequences" in text]
    assert line.startswith("stage 'one': 12 rows in ")


class CtrlC(TrainerCallback):
    """Presses Ctrl-C in a step of a stage."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step
        self.now = ""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if (self.now, state.global_step + 1) == (self.stage, self.step):
            os.kill(os.getpid(), signal.SIGINT)


def go(run: Path, press: CtrlC | None = None, **options: Any) -> None:
    def display(stage: Any, *_: int) -> list[TrainerCallback]:
        if press is not None:
            press.now = stage.name
        return [] if press is None else [press]

    train(plan_training(run, device="cpu", **options), display=display)


@pytest.fixture(scope="module")
def whole(dropout_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = ready(dropout_parts, tmp_path_factory.mktemp("grouped") / "run")
    go(run)
    return run


def ready(parts: Path, run: Path) -> Path:
    make_run(parts, run, "llava")
    stages: list[dict[str, Any]] = [
        {"name": "packs", "epochs": 2, "packing": True, "max_length": 100, "batch_size": 1},
        {"name": "lengths", "epochs": 2, "group_by": "length", "batch_size": 3},
        {"name": "kinds", "epochs": 2, "group_by": "modality", "batch_size": 2, "image_share": 0.4},
    ]
    if importlib.util.find_spec("bitsandbytes") is not None:
        stages[-1]["optimizer"] = "adamw_8bit"
    every = {"train": ["projector"], "text_rows": "graft", "lr": 1e-3}
    write_recipe(run, parts, "llava", [{**every, **one} for one in stages], save_every=1)
    return run


def test_a_stopped_run_goes_on_to_the_bit(
    dropout_parts: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second epoch of packs, with lengths that were measured by the sitting before.

    Also where rows are shown again for the sake of a share, under an 8-bit optimizer.
    """
    run = ready(dropout_parts, tmp_path / "run")
    steps = sum(stage == "packs" for stage, *_ in losses(whole))
    assert steps % 2 == 0
    with pytest.raises(TrainingStopped):
        go(run, CtrlC("packs", steps // 2 + 1))
    kept = run / "checkpoints" / "1-packs" / LENGTHS
    measured = np.load(kept)
    assert measured.shape == (12,)
    np.save(kept, measured[1:])
    with pytest.raises(UsageError, match="written for 11 rows, and now there are 12"):
        go(run, resume=True)
    np.save(kept, measured)
    monkeypatch.setattr(
        "mmgraft.data.batches.dataset.RowDataset.length", None
    )  # of the resumed stage
    with pytest.raises(TypeError):
        go(run, resume=True)  # the next stage measures
    monkeypatch.undo()
    with pytest.raises(TrainingStopped):
        go(run, CtrlC("lengths", 3), resume=True)
    with pytest.raises(TrainingStopped):
        go(run, CtrlC("kinds", 8), resume=True)
    go(run, resume=True)
    mine, wanted = load_file(run / "graft.safetensors"), load_file(whole / "graft.safetensors")
    assert all(torch.equal(mine[name], one) for name, one in wanted.items())
    assert losses(run) == losses(whole)
    assert not list((run / "checkpoints").glob(f"*/{LENGTHS}"))


def test_rows_that_cannot_be_used_are_in_no_pack(parts: Path, tmp_path: Path) -> None:
    """Too short a sequence for the longest prompts; the log says which."""
    run = make_run(parts, tmp_path / "run", "llava")
    stage = {"name": "one", "packing": True, "max_length": 40, "max_steps": 1, **ALL}
    stage["train"] = ["projector"]
    write_recipe(run, parts, "llava", [stage], on_bad_row="skip")
    train(plan_training(run, device="cpu"))
    log = (run / "bad_rows.jsonl").read_text().splitlines()
    assert log
    assert all("nothing to learn" in line for line in log)


def test_the_base_s_attention_is_the_recipe_s(parts: Path, tmp_path: Path) -> None:
    run = make_run(parts, tmp_path / "run", "iaa")
    write_recipe(run, parts, "iaa", [{"name": "one", **ALL}], attention="eager")
    session = Session(plan_training(run, device="cpu"), lambda text: None)
    session.load()
    model: Any = session.model
    used = {
        module.config._attn_implementation
        for module in (*model.base.modules(), *model.workflow().graft.layers.modules())
        if hasattr(module, "config")
    }
    assert used == {"eager"}
    stage = {"name": "one", "precision": "bf16", **ALL}
    write_recipe(run, parts, "iaa", [stage], attention="flash_attention_2")
    with pytest.raises(UsageError, match="flash_attention_2 needs a CUDA card"):
        plan_training(run, device="cpu")
